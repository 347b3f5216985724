"""What ``python -m pipeline`` can be told, and what a recipe holds. Imports nothing heavy."""

from dataclasses import dataclass, field
from pathlib import Path

from common.settings import option
from train.slurm import Request


@dataclass
class PipelineCommand:
    """Carry out a recipe."""

    recipe: str | None = None
    """YAML file of stages, such as recipes/demo.yaml."""
    changes: list[str] = option([])
    """Other values for this time, STAGE.SETTING=VALUE, folder=DIR or slurm=account=lab; typed behind the recipe,
    without the flag."""
    show: bool = False
    """Show every stage's command and what is done already, and stop."""
    plan: bool = False
    """Print what the stages that train would cost, and stop."""
    gpu: str | None = None
    """With --plan: the GPU to plan for. Default: the recipe's."""
    price: float | None = None
    """With --plan: price of a GPU-hour in dollars. Default: the recipe's."""
    slurm: bool = False
    """Submit the stages as SLURM jobs that wait for each other, with the requests that the recipe has for them."""

    def __post_init__(self) -> None:
        if self.recipe is None:
            raise ValueError("give a recipe: python -m pipeline recipes/demo.yaml")
        if self.show + self.plan + self.slurm > 1:
            raise ValueError("--show, --plan and --slurm are three things to do; give one")
        for name in ("gpu", "price"):
            if getattr(self, name) is not None and not self.plan:
                raise ValueError(f"--{name} belongs to --plan")


@dataclass(frozen=True)
class Stage:
    """One command of a recipe."""

    name: str
    command: str
    """A key of :data:`pipeline.stages.KINDS`, such as ``train`` or ``data tokenizer``."""
    settings: dict[str, str] = field(default_factory=dict)
    """Values by the names of the command's flags, as they are typed. ``${STAGE}`` in a value is what that stage makes,
    ``${STAGE.run}`` its run folder."""
    after: tuple[str, ...] = ()
    """Stages whose results this one reads without naming them."""
    slurm: Request | None = None
    """What to ask of SLURM for it."""


@dataclass(frozen=True)
class Recipe:
    """A path from text to a phone."""

    name: str
    folder: Path
    """Where the stages write, each into a folder of its name."""
    stages: tuple[Stage, ...]
    gpu: str | None = None
    """The GPU that its plan is for."""
    price: float | None = None
    """Dollars a GPU-hour in its plan."""
