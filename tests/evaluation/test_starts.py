"""What only generation needs is not imported before: transformers' models take seconds."""

import subprocess
import sys

import pytest

from tests.support.launching import ROOT, launch_environment

MODELS = ("transformers.modeling_utils", "transformers.models.llama.modeling_llama", "deepspeed")


@pytest.mark.parametrize(
    "modules",
    [
        ("tensorlm.evaluation.launch", "tensorlm.evaluation.compare"),
        ("tensorlm.hf.import_folder", "tensorlm.hf.export_folder", "tensorlm.hf.write_config"),
    ],
    ids=["evaluation", "conversion"],
)
def test_models_of_transformers_are_imported_when_they_are_used(modules: tuple[str, ...]) -> None:
    code = f"import sys, {', '.join(modules)}; print([m for m in {MODELS} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=launch_environment(), capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert result.stdout == "[]\n"
