"""Models to score: from a model folder of any origin, or one that is in memory and being trained."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from common.errors import UserError
from models.folder import check_model
from models.foreign import Foreign
from models.hf import to_hugging_face
from models.hf_config import to_config
from models.transformer import Transformer

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
"""Without one of these transformers makes up an empty tokenizer."""


def load(folder: Path, device: str = "auto", dtype: str = "auto") -> tuple[Any, Any]:
    """A model folder's model, in eval mode on its device, and its tokenizer; no code of the folder's is run.

    Args:
        folder: ours or another's.
        device: cpu, cuda, or auto: cuda where there is one.
        dtype: float32, bfloat16, float16, or auto: float32 on a CPU, float16 on CUDA as OpenCompass has it.

    Raises:
        UserError: it is no model folder, its weights are no safetensors or do not fit its ``config.json``, it has no
            tokenizer or one without an end token, or the device is not there.
    """
    check_model(folder)
    where = _device(device)
    tokenizer = load_tokenizer(folder)
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    kind = ("float16" if where == "cuda" else "float32") if dtype == "auto" else dtype
    with _readable(f"the model in {folder}"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=getattr(torch, kind),
            output_loading_info=True,
            ignore_mismatched_sizes=True,
        )
        model, found = loaded
        model.to(where).eval()
    lost = sorted({*found["missing_keys"], *(name for name, *_ in found["mismatched_keys"])})
    if lost:  # transformers has filled them with random numbers
        raise UserError(f"the weights of {folder} do not fit its config.json: {', '.join(lost)[:200]}")
    return model, tokenizer


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer in a folder; UserError when there is none, or it names no end token."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(f"{folder} has no tokenizer: a tokenizer.json belongs beside its config.json")
    from transformers import AutoTokenizer

    with _readable(f"the tokenizer of {folder}"):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"the tokenizer in {folder} names no eos_token, at which answers end; add it to its tokenizer_config.json"
        )
    return tokenizer


def in_memory(model: Transformer | Foreign) -> Any:
    """A model being trained as transformers' own, on the very same weights: nothing is copied.

    What the training changes in the weights, it changes here too. The weights must be whole on this rank; under FSDP
    the caller gathers them first.
    """
    if isinstance(model, Foreign):
        return model.hf
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**to_config(model.config, bos=None, eos=0, pad=None))
    with torch.device("meta"):
        twin = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    twin.load_state_dict(to_hugging_face(weights, model.config), strict=False, assign=True)
    twin.tie_weights()
    device = model.embedding.weight.device
    with device:  # its table of frequencies is no weight, so nothing has filled it
        twin.model.rotary_emb = type(twin.model.rotary_emb)(config)
    twin.generation_config.eos_token_id = None
    return twin.requires_grad_(False).eval()


def _device(name: str) -> str:
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda is not there: torch sees no CUDA device")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


@contextmanager
def _readable(what: str) -> Iterator[None]:
    """Make one line for the user of whatever transformers raises over a file: it is of no type in particular."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{what} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
