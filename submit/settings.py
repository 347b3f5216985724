"""What ``python -m submit`` can be told. Imports nothing heavy: ``--help`` reads this module."""

from dataclasses import dataclass

from common.settings import option


@dataclass
class ReportCommand:
    """The page of a run."""

    run: str | None = None
    """Run folder, finished or running."""
    out: str | None = None
    """File to write. Default: report.html in the run folder."""
    serve: bool = False
    """Show the page at an address of this machine instead, and keep it current while the run goes on."""
    host: str = "127.0.0.1"
    """With --serve: address to listen on; others than this machine's own can be reached by everyone there."""
    port: int = 8000
    """With --serve: port to listen on; 0: any that is free."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("give the run folder: python -m submit report runs/NAME")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be from 0 to 65535, not {self.port}")
        if self.serve and self.out is not None:
            raise ValueError("--serve writes no file; leave --out out")


@dataclass
class LeaderboardCommand:
    """Runs side by side with each other and with what others have published."""

    runs: list[str] = option([])
    """Run folders, or NAME=RUN,RUN,RUN: the three compressed models that are one entry of track 1."""
    out: str = "leaderboard.html"
    """File to write."""


@dataclass
class BundleCommand:
    """What the competition asks for, from a run."""

    run: str | None = None
    """Run folder with a model, scores and an export."""
    out: str | None = None
    """Folder to write, and OUT.tar beside it. Default: bundle/ in the run."""
    apk: str | None = None
    """APK that MLC-LLM's app was built into."""
    screenshot: str | None = None
    """Picture of the app answering on the phone."""
    checkpoint_link: str | None = None
    """Where the checkpoint can be downloaded."""
    compiled_link: str | None = None
    """Where the compiled model can be downloaded."""
    verify: bool = True
    """Unpack the archive elsewhere, check every hash, load and score the model with the code in it alone."""

    def __post_init__(self) -> None:
        if self.run is None:
            raise ValueError("give the run: python -m submit bundle runs/NAME --out DIR")
