"""From a model folder to its score: what both tracks call."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from common.console import Console
from common.errors import UserError
from common.files import exclusive
from common.run_folder import git_commit
from common.settings import to_dict
from models.folder import check_model
from scoring import sample, sandbox
from scoring.answers import Answers
from scoring.competition import GROUPS, TASKS, Row, Scored, group_score, score_outputs, task_extras, task_score
from scoring.competition.data import count_warning
from scoring.fingerprint import fingerprint
from scoring.loading import load, load_tokenizer
from scoring.requests import Engine
from scoring.results import Score, TaskResult, interval, means
from scoring.settings import ScoreSettings, data_folder, fine_tuned, out_folder, words


def score(folder: Path, settings: ScoreSettings, console: Console | None = None) -> Score:
    """Score a model folder, whichever track it is from; the results are written into ``out_folder``.

    Called again with the same settings after a kill it goes on where it was, and after the end it finds every answer
    there and gives the same scores.

    Args:
        folder: a model folder of ours or another's.
        settings: what to score, and how.
        console: where progress is shown; None shows none.

    Raises:
        UserError: the folder, the data, the engine or kept answers are not fit for it; finished answers are kept.
    """
    console = console or Console(rank=1)
    check_model(folder)
    form, out = choose_form(folder, settings.form), out_folder(folder, settings)
    with exclusive(out, f"the scores in {out}"):
        found = _Scoring(folder, settings, form, out, console).run()
        found.write(out)
    return found


def empty_score(folder: Path, settings: ScoreSettings, form: str) -> Score:
    """The score of a model with nothing in it yet but its marks and what it is made with."""
    marks = ["sample: a few items, written for trying the path out, no benchmark"] * ("sample" in settings.suites)
    marks += [f"limit: {_limited_to(settings)}"] * (settings.limit is not None)
    made_with = {"form": form, "form_asked": settings.form, "weights": fingerprint(folder), "git": git_commit()}
    return Score(str(folder), marks, to_dict(settings) | made_with)


def _limited_to(settings: ScoreSettings) -> str:
    """Which rows a limit leaves: lm-evaluation-harness takes the first of its own tasks."""
    drawn = [f"{settings.limit} rows a task, drawn by seed {settings.seed}"] * bool(settings.suites)
    first = [f"the first {settings.limit} rows of each of --tasks"] * bool(settings.tasks)
    return "; ".join(drawn + first)


class _Scoring:
    """One run: the model is loaded when it is first needed, and once."""

    def __init__(self, folder: Path, settings: ScoreSettings, form: str, out: Path, console: Console) -> None:
        self.folder, self.settings, self.form, self.out, self.console = folder, settings, form, out, console
        self.found = empty_score(folder, settings, form)

    def run(self) -> Score:
        """Everything that was asked for."""
        settings, found = self.settings, self.found
        for suite in settings.suites:
            if suite in ("competition", "sample"):
                self._competition(sample.FOLDER if suite == "sample" else data_folder(settings.data))
            elif suite == "quick":
                found.quick = self._quick()
            else:
                self._c4()
        if settings.tasks:
            self._harness_tasks(words(settings.tasks))
        self._measure()
        return found

    # The model

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        return load(self.folder, self.settings.device, self.settings.dtype)

    def _generation(self, *, early_stop: bool) -> Any:
        from scoring.generation import GenerationSettings

        s = self.settings
        return GenerationSettings(s.batch_size, s.max_seq_len, self.form == "chat", early_stop)

    @contextmanager
    def _harness_model(self, name: str) -> Iterator[Any]:
        """What lm-evaluation-harness asks; its answers are kept as ``NAME.jsonl``."""
        from scoring.harness import FolderModel

        engine, tokenizer = self._engine()
        asked = {"model": self.found.asked["weights"], **engine.asked}
        with Answers(self.out / f"{name}.jsonl", asked) as answers:
            yield FolderModel(engine, tokenizer, answers, self.console)

    def _engine(self) -> tuple[Any, Any]:
        s = self.settings
        generation = self._generation(early_stop=s.early_stop)
        if s.engine == "vllm":
            from scoring.vllm_engine import VllmGenerator

            dtype = "float16" if s.dtype == "auto" else s.dtype
            vllm: Any = VllmGenerator(self.folder, generation, dtype=dtype, say=self.console.say)
            return vllm, vllm.tokenizer
        from scoring.generation import Generator

        model, tokenizer = self._loaded
        engine: Engine = Generator(model, tokenizer, generation)
        return engine, tokenizer

    # The competition's tasks, and the sample's

    def _competition(self, data: Path | None) -> None:
        names = self._names(data)
        if self.settings.engine == "opencompass":
            self.found.competition = self._by_opencompass(data)
        else:
            if "humaneval" in names:
                self._say_of_sandbox()
            self.found.competition = self._own_competition(names, data)
        scores = [result.score for result in self.found.competition]
        if len(scores) == len(GROUPS) and None not in scores:
            self.found.means = means([score for score in scores if score is not None])

    def _names(self, data: Path | None) -> list[str]:
        """The tasks to score: of the sample, those of its subtasks that it has."""
        groups = words(self.settings.only) or list(GROUPS)
        unknown = [group for group in groups if group not in GROUPS]
        if unknown:
            raise UserError(f"--only {unknown[0]} is none of the tasks {', '.join(GROUPS)}")
        names = [name for group in GROUPS if group in groups for name in GROUPS[group]]
        if data == sample.FOLDER:
            return [name for name in names if any((data / file).exists() for file in TASKS[name].files)]
        return names

    def _own_competition(self, names: Sequence[str], data: Path | None) -> list[TaskResult]:
        from scoring.competition.harness import answered
        from scoring.competition.harness import load as load_tasks
        from scoring.harness import evaluate

        s = self.settings
        tasks = load_tasks(names, data, limit=s.limit, seed=s.seed, max_new_tokens=s.max_out_len)
        with self._harness_model("answers") as model:
            results = evaluate(model, tasks, apply_chat_template=self.form == "chat")
        return self._judged({name: (one.rows, one.outputs) for name, one in answered(results).items()}, data)

    def _judged(
        self, answers: Mapping[str, tuple[Sequence[Row], Sequence[str]]], data: Path | None
    ) -> list[TaskResult]:
        """Score outputs by task, and put them together to the competition's table."""
        scored: dict[str, list[Scored]] = {}
        for name, (rows, outputs) in answers.items():
            if TASKS[name].program:
                self.console.say(f"running the {len(rows):,} programs of {name}")
            scored[name], not_run = score_outputs(
                TASKS[name], rows, outputs, unsafe=self.settings.unsafe_code_execution
            )
            if not_run:
                self._warn(f"{name} was not run: {not_run}")
            warning = count_warning(TASKS[name], len(rows))
            if warning and self.settings.limit is None and data != sample.FOLDER:
                self._warn(warning)
        return [self._group(group, scored) for group in GROUPS if any(name in scored for name in GROUPS[group])]

    def _group(self, group: str, scored: Mapping[str, Sequence[Scored]]) -> TaskResult:
        """A line of the competition's table."""
        mine = {name: scored[name] for name in GROUPS[group] if name in scored}
        if len(mine) < len(GROUPS[group]):
            self._warn(f"{group} is the mean of {len(mine)} of its {len(GROUPS[group])} tasks")
        scores = {name: task_score(TASKS[name], rows) for name, rows in mine.items()}
        parts = [[one.value for one in rows if one.value is not None] for rows in mine.values()]
        alone = len(GROUPS[group]) == 1
        subtasks = {name: value for name, value in scores.items() if value is not None}
        return TaskResult(
            name=group,
            score=group_score(group, scores),
            interval=interval(parts, self.settings.seed),
            chance=sum(TASKS[name].chance for name in mine) / len(mine),
            items=sum(map(len, parts)),
            extras=task_extras(TASKS[group], mine[group]) if alone else subtasks,
        )

    def _by_opencompass(self, data: Path | None) -> list[TaskResult]:
        """OpenCompass's own scores; intervals come from judging its answers here."""
        from scoring.competition.data import read_rows
        from scoring.competition.open_books import read_answers
        from scoring.opencompass import score_with_opencompass

        s = self.settings
        assert s.opencompass_python is not None
        where = self.out / "opencompass"
        theirs = score_with_opencompass(
            self.folder,
            where,
            s.opencompass_python,
            data,
            max_out_len=s.max_out_len,
            form="chat" if self.form == "chat" else "base",
            max_seq_len=s.max_seq_len,
            unsafe=s.unsafe_code_execution,
            say=self.console.say,
        )
        answers = {}
        for name, lines in read_answers(where / "answers.jsonl").items():
            rows = read_rows(TASKS[name], data)
            answers[name] = ([rows[number] for number in lines], [line["output"] for line in lines.values()])
        found = []
        for ours in self._judged(answers, data):
            score = theirs.get(ours.name)
            if score is not None and ours.score is not None and abs(score - ours.score) > 0.011:  # they round
                self._warn(f"{ours.name}: OpenCompass scores its answers {score:.2f}, this project {ours.score:.2f}")
            extras = {name: theirs.get(name, value) for name, value in ours.extras.items()}
            found.append(TaskResult(ours.name, score, ours.interval, ours.chance, ours.items, extras))
        return found

    def _say_of_sandbox(self) -> None:
        if self.settings.unsafe_code_execution:
            self._warn("HumanEval's programs run WITHOUT A SANDBOX: what the model writes can do whatever you can")
        elif reason := sandbox.available():
            self.console.warn(f"HumanEval will not be run and there will be no mean: {reason}")

    # Likelihoods and perplexity

    def _quick(self) -> list[TaskResult]:
        from scoring.generation import Generator
        from scoring.harness import FolderModel
        from scoring.quick import TASKS as QUICK
        from scoring.quick.scores import score_quick

        model, tokenizer = self._loaded
        s = self.settings
        # Likelihoods of plain text, whatever the model was trained to.
        generator = Generator(model, tokenizer, self._generation(early_stop=True))
        lm = FolderModel(generator, tokenizer, console=self.console)
        results, warnings = score_quick(lm, list(QUICK), data_folder(s.data), limit=s.limit, seed=s.seed)
        for warning in warnings:
            self._warn(warning)
        return results

    def _c4(self) -> None:
        from scoring.perplexity import c4

        model, tokenizer = self._loaded
        self.console.start(1, 0)
        try:
            report = c4(
                model,
                tokenizer,
                self.settings.text,
                tokens=self.settings.text_tokens,
                progress=lambda done, total: self.console.progress(done, total, {"c4": f"{done:,} tokens"}),
            )
        finally:
            self.console.stop()
        self.found.c4 = asdict(report) | {
            "packed_perplexity": report.packed.perplexity,
            "galore_perplexity": report.galore.perplexity,
        }
        for note in report.notes:
            self._warn(f"c4: {note}")

    def _harness_tasks(self, names: list[str]) -> None:
        """Tasks of lm-evaluation-harness, whole, as it knows them."""
        from lm_eval.tasks import TaskManager

        from scoring.harness import evaluate

        manager = TaskManager()
        unknown = [name for name in names if name not in manager.all_tasks]
        if unknown:
            raise UserError(f"--tasks {unknown[0]} is no task of lm-evaluation-harness; lm-eval ls tasks lists them")
        with self._harness_model("tasks") as model:
            try:
                tasks, chat = manager.load(names), self.form == "chat"
                results = evaluate(model, tasks, limit=self.settings.limit, apply_chat_template=chat)
            except (ConnectionError, OSError, ValueError, ImportError, RuntimeError) as error:
                raise UserError(f"lm-evaluation-harness: {' '.join(str(error).split())[:300]}") from error
        self.found.tasks = {name: dict(values) for name, values in results["results"].items()}

    # Size, speed, memory

    def _measure(self) -> None:
        from scoring import speed

        if self.settings.engine != "transformers" and not self.settings.speed:
            return
        model, tokenizer = self._loaded
        self.found.parameters = asdict(speed.parameters(model))
        if not self.settings.speed:
            return
        self.console.say("measuring speed and memory")
        report = speed.measure(model, tokenizer, model.device)
        self.found.speed = asdict(report) | {"throughput": report.throughput}
        for note in report.notes:
            self._warn(f"speed: {note}")

    def _warn(self, text: str) -> None:
        self.console.warn(text)
        self.found.warnings.append(text)


def choose_form(folder: Path, asked: str) -> str:
    """``base`` or ``chat``: as asked, by default as the model was trained.

    Raises:
        UserError: chat is asked of a model that has no template.
    """
    template = bool(load_tokenizer(folder).chat_template)
    if asked == "chat" and not template:
        raise UserError(f"{folder} has no chat template, so it cannot be asked as a chat; use --form base")
    if asked != "auto":
        return asked
    ours = fine_tuned(folder)
    return "chat" if template and ours is not False else "base"
