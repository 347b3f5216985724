"""lm-evaluation-harness's view of a model: its three questions, answered by our engines."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import tqdm
from lm_eval import evaluator
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from common.console import Console
from common.errors import UserError
from scoring.answers import Answers
from scoring.batches import Plan
from scoring.competition import TASKS
from scoring.generation import Generator
from scoring.likelihoods import Likelihoods
from scoring.progress import Progress
from scoring.requests import Engine, Key, Request, never

DEFAULT_NEW_TOKENS = 256
"""lm-evaluation-harness's own, of a task that names no other."""


def evaluate(model: LM, tasks: Any, **options: Any) -> dict[str, Any]:
    """What lm-evaluation-harness finds of a model, without its bars, its log lines and its own intervals.

    Args:
        model: whom to ask.
        tasks: from a TaskManager's ``load``.
        options: of ``lm_eval.evaluator.evaluate``.
    """
    with _without_bars():
        results = evaluator.evaluate(model, tasks, bootstrap_iters=0, **options)
    assert results is not None  # it is for ranks other than 0 only
    return dict(results)


@contextmanager
def _without_bars() -> Iterator[None]:
    """Ours are shown in place of the harness's, which it has no option against."""
    begin, logger = tqdm.tqdm.__init__, logging.getLogger("lm_eval")

    def disabled(self: Any, *args: Any, **options: Any) -> None:
        begin(self, *args, **(options | {"disable": True}))

    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with patch.object(tqdm.tqdm, "__init__", disabled):
            yield
    finally:
        logger.setLevel(level)


class FolderModel(LM):
    """A model for ``lm_eval.evaluator.evaluate``.

    The competition's tasks stop early where their scores are decided; others stop at their own strings.

    Args:
        engine: what generates. Likelihoods are the transformers engine's alone.
        tokenizer: the model's.
        answers: where generated answers are kept and taken from; None keeps none.
        console: where progress is shown; None shows none.
    """

    def __init__(
        self, engine: Engine, tokenizer: Any, answers: Answers | None = None, console: Console | None = None
    ) -> None:
        super().__init__()
        self.engine, self.tokenizer, self.answers = engine, tokenizer, answers
        self._console = console or Console(rank=1)

    @property
    def tokenizer_name(self) -> str:
        """Where the tokenizer is from."""
        return str(self.tokenizer.name_or_path)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The tokenizer's template; which of several is not asked."""
        return str(self.tokenizer.chat_template or "")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's template writes it, by default with the opening of an answer.

        Raises:
            UserError: there is no template, or it refuses the conversation.
        """
        return render_chat(self.tokenizer, chat_history, add_generation_prompt=add_generation_prompt)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Greedy answers, each cut before the first of its task's stop strings.

        Raises:
            UserError: a task asks for sampling, or what the answers or the engine raise.
        """
        asked = [request_of(instance) for instance in requests]
        outputs = answer_all(self.engine, list({one.key: one for one in asked}.values()), self.answers, self._console)
        each = zip(asked, requests, strict=True)
        return [cut(outputs[one.key], stop_strings(instance.args[1])) for one, instance in each]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See :meth:`scoring.likelihoods.Likelihoods.of_pairs`."""
        return self._likelihoods().of_pairs([instance.args for instance in requests])

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See :meth:`scoring.likelihoods.Likelihoods.of_texts`."""
        return self._likelihoods().of_texts([instance.args[0] for instance in requests])

    def _likelihoods(self) -> Likelihoods:
        if not isinstance(self.engine, Generator):
            raise UserError("these tasks need likelihoods, which only --engine transformers computes")
        return Likelihoods(self.engine.model, self.tokenizer, self.engine.limit, self._console)


def answer_all(
    engine: Engine, requests: Sequence[Request], answers: Answers | None, console: Console
) -> dict[Key, str]:
    """The answer to every request by its key: those that are kept already, and the engine's.

    Args:
        engine: ours repeats the batches that it was stopped in; another one is asked for what is missing.
        requests: with distinct keys.
        answers: where they are kept; None keeps none.
        console: where progress is shown.
    """
    make: Callable[[], Plan] = partial(engine.plan, requests) if isinstance(engine, Generator) else list
    plan = answers.begin(requests, make) if answers is not None else make()
    outputs = dict(answers.outputs) if answers is not None else {}
    done = frozenset(outputs)
    with Progress(console, (one.task for one in requests), (task for task, _ in done)) as progress:

        def keep(request: Request, output: str) -> None:
            if answers is not None:
                answers.keep(request, output)
            outputs[request.key] = output
            progress.add(request.task)

        if isinstance(engine, Generator):
            engine.follow(plan, requests, keep, done)
        else:
            engine.generate([one for one in requests if one.key not in done], keep)
    return outputs


def request_of(instance: Instance) -> Request:
    """What a task's instance asks of an engine.

    The competition's tasks name their row in their documents, for a limited run draws some of all; the harness has
    tasks of the same names that are something else.
    """
    prompt, options = instance.args
    if options.get("do_sample") or options.get("temperature"):
        raise UserError(f"the task {instance.task_name} asks for sampling; answers here are the likeliest tokens")
    own = TASKS[instance.task_name] if instance.doc.get("task") == instance.task_name in TASKS else None
    stops = stop_strings(options)
    ends = (lambda text: any(stop in text for stop in stops)) if stops else never
    return Request(
        task=instance.task_name,
        row=instance.doc["row"] if own else instance.doc_id,
        prompt=prompt,
        max_new_tokens=int(options.get("max_gen_toks", DEFAULT_NEW_TOKENS)),
        finished=own.finished if own else ends,
    )


def stop_strings(options: dict[str, Any]) -> list[str]:
    """The strings that a task wants its answers cut at."""
    until = options.get("until") or []
    return [until] if isinstance(until, str) else [stop for stop in until if stop]


def cut(text: str, stops: Sequence[str]) -> str:
    """A text up to the first stop string in it."""
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def render_chat(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """Messages as a tokenizer's chat template writes them; UserError when it has none or refuses them."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path} has no chat template; score it in the form of base models (--form base)"
        )
    try:
        return str(
            tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )
    except TemplateError as error:
        raise UserError(f"the model's chat template refuses this conversation: {error}") from error
