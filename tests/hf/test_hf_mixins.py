"""transformers' own tests of models, run on a tiny exported folder.

`make install` unpacks them from the source distribution of the installed version, which holds the
tests of models, but neither those of generation (`test_hf_generate.py` has ours) nor those of
exporters.
"""

import importlib
import sys
import tempfile
import unittest
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from tests.hf.test_hf_generate import folded_model

SOURCE = Path(sys.prefix) / f"share/transformers-{transformers.__version__}"
if not (SOURCE / "tests/test_modeling_common.py").exists():
    pytest.skip(f"{SOURCE} has no tests of transformers (make install)", allow_module_level=True)
pytest.importorskip("parameterized")

_NO_WEIGHTS = "output_attentions must be false: attention weights never exist"
# The tests that ask for what the model refuses on purpose, with the words of the refusal.
REFUSALS = {
    # Attention is never a T x T matrix, so there are no weights to return.
    "test_attention_outputs": _NO_WEIGHTS,
    "test_eager_matches_sdpa_inference_24_fp32_pad_left_output_attentions": _NO_WEIGHTS,
    "test_model_outputs_equivalence": _NO_WEIGHTS,  # after those without attention weights
    "test_retain_grad_hidden_states_attentions": _NO_WEIGHTS,
    # The operator has one rotary table for every length, as the trainer does.
    "test_model_rope_scaling_from_config_1_dynamic": "rope_type must be .*got dynamic",
    "test_model_rope_scaling_from_config_2_yarn": "rope_type must be .*got yarn",
}


def _load_mixin() -> Any:
    """ModelTesterMixin, with empty classes for the tests that the distribution lacks."""
    package = ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE / "tests")]
    absent = {"exporters.test_export": "ExportTesterMixin"}
    absent |= {"generation.test_utils": "GenerationTesterMixin"}
    modules: dict[str, ModuleType] = {"transformers_tests": package}
    for name, kind in absent.items():
        stub = ModuleType(f"transformers_tests.{name}")
        setattr(stub, kind, type(kind, (), {}))
        modules[stub.__name__] = stub
        parent = stub.__name__.rsplit(".", 1)[0]
        modules[parent] = ModuleType(parent)
    unchecked = mock.patch.object(pytest.mark, "_config", None)  # its marks are not ours
    with mock.patch.dict(sys.modules, modules), unchecked:
        return importlib.import_module("transformers_tests.test_modeling_common")


COMMON = _load_mixin()


class TinyModel:
    """The configuration and inputs that the tests ask for."""

    batch_size, seq_length = 3, 7
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    is_training = True

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def get_config(self) -> Any:
        return AutoConfig.from_pretrained(self.folder, trust_remote_code=True)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        tokens = torch.randint(3, 99, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


class ExportedModel:
    """The classes of an exported folder's code, under names that transformers' tests look up."""

    @classmethod
    def setUpClass(cls: Any) -> None:
        folder = Path(cls.enterClassContext(tempfile.TemporaryDirectory()))
        model = folded_model(  # a strided and a routed layer
            [2, 3], num_hidden_layers=2, vocab_size=99, initializer_range=0.02, pad_token_id=0,
            route={"block": 2, "top_k": 1, "stretch": 2}, route_every=2,
        )  # fmt: skip
        model.save_pretrained(folder)
        kinds = {"model": AutoModel, "causal": AutoModelForCausalLM}
        loaded = [k.from_pretrained(folder, trust_remote_code=True) for k in kinds.values()]
        cls.all_model_classes = tuple(type(m) for m in loaded)
        cls.folder = folder
        tables = (
            modeling_auto.MODEL_MAPPING_NAMES,
            modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        )
        for table, kind in zip(tables, cls.all_model_classes, strict=True):
            cls.enterClassContext(mock.patch.dict(table, {"tensorlm": kind.__name__}))

    def setUp(self: Any) -> None:
        self.model_tester = TinyModel(self.folder)


def _refused(name: str) -> Callable[[Any], None]:
    def check(self: Any) -> None:
        with pytest.raises(ValueError, match=REFUSALS[name]):
            getattr(COMMON.ModelTesterMixin, name)(self)

    return check


# Every test of transformers' ModelTesterMixin; those in `REFUSALS` must be refused.
TestExportedModel = type(
    "TestExportedModel",
    (ExportedModel, COMMON.ModelTesterMixin, COMMON.GenerationTesterMixin, unittest.TestCase),
    {name: _refused(name) for name in REFUSALS},
)
