"""``import fewbits`` is light and still teaches transformers, in whichever order the two are imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

LOAD = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("LOADED", type(model.model.layers[0].mlp.up_proj).__name__)
"""


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=120)


def test_light_and_before_transformers(checkpoint):
    code = """
import sys
import fewbits
heavy = {"torch", "transformers", "numpy", "scipy", "pydantic"} & set(sys.modules)
assert not heavy, heavy
import fewbits._autoload
fewbits._autoload.enable()
assert sum(type(f).__name__ == "_Hook" for f in sys.meta_path) == 1
""" + LOAD + """
assert not any(type(f).__name__ == "_Hook" and f.__module__.startswith("fewbits") for f in sys.meta_path)
"""
    done = run(code, checkpoint("llama")[0])
    assert "LOADED QuantLinear" in done.stdout, done.stderr


def test_after_transformers():
    code = """
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
assert "fewbits" not in table
import fewbits
assert "fewbits" in table
"""
    done = run(code, Path())
    assert done.returncode == 0, done.stderr


def test_plugin_module_first():
    code = """
import fewbits.serving.transformers as plugin
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table
plugin.register()
assert table["fewbits"] is plugin.FewbitsHfQuantizer
"""
    done = run(code, Path())
    assert done.returncode == 0, done.stderr


def test_without_fewbits_nothing_is_loaded(checkpoint):
    done = run("import sys\n" + LOAD, checkpoint("llama")[0])
    assert done.returncode != 0 and "LOADED" not in done.stdout
    assert "model.safetensors" in done.stderr and "OSError" in done.stderr
