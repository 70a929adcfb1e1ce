"""lm-eval's own `hf` model reads an exported folder and scores it as our model does."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tensorlm.data.tokenizer.tokenizers import DocumentEncoder, load_tokenizer
from tensorlm.hf.export_folder import export_checkpoint
from tests.hf.test_hf_routed import ROUTED
from tests.support.hf_models import random_checkpoint
from tests.support.tokenizer_folders import byte_level, write_folder

pytest.importorskip("lm_eval", reason="pip install 'lm_eval[hf]==0.4.13'")

TASK = """
task: local_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS: list[dict[str, Any]] = [
    {"question": "import os\nimport sys\ndef main", "choices": ["(argv):", " = 1 + 1", " banana"]},
    {"question": "class Stack:\n    def", "choices": [" push(self, item):", "return", " 7 7 7 7"]},
]


def test_lm_eval_scores_an_exported_folder_with_a_local_task(
    tmp_path: Path, config: Path, data: Path
) -> None:
    checkpoint, settings, model = random_checkpoint(config, "model.fold=[4,8]")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", data / "tokenizer")
    (tmp_path / "tasks").mkdir()
    lines = "\n".join(json.dumps(question) for question in QUESTIONS)
    (tmp_path / "questions.jsonl").write_text(lines)
    task = TASK.format(file=tmp_path / "questions.jsonl")
    (tmp_path / "tasks/local_choice.yaml").write_text(task)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--tasks", "local_choice"]
    model_args = f"pretrained={tmp_path / 'hf'},trust_remote_code=True,dtype=float32"
    command += ["--model_args", model_args]
    command += ["--include_path", str(tmp_path / "tasks"), "--batch_size", "2", "--device", "cpu"]
    command += ["--output_path", str(tmp_path / "out"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    subprocess.run(command, env=os.environ | offline, cwd=tmp_path, check=True, timeout=300)

    (samples,) = (tmp_path / "out").rglob("samples_local_choice_*.jsonl")
    found = [json.loads(line) for line in samples.read_text().splitlines()]
    tokenizer = load_tokenizer(data / "tokenizer")
    for sample, question in zip(found, QUESTIONS, strict=True):
        scores = [float(response[0][0]) for response in sample["resps"]]
        for score, choice in zip(scores, question["choices"], strict=True):
            prompt = tokenizer.encode(question["question"])
            whole = tokenizer.encode(question["question"] + choice)
            with torch.no_grad():
                logits = F.log_softmax(model(torch.tensor([whole]))[0], dim=-1)
            wanted = sum(logits[i - 1, whole[i]].item() for i in range(len(prompt), len(whole)))
            assert score == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("template", ["adds BOS", "adds none"])
def test_likelihoods_of_the_documented_settings_are_ours(
    tmp_path: Path, config: Path, data: Path, template: str
) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    layers = ROUTED if template == "adds none" else ("model.fold=[4,8]",)
    checkpoint, settings, model = random_checkpoint(config, *layers)
    folder = data / "tokenizer"
    if template == "adds none":
        folder = write_folder(tmp_path / "tok", byte_level(), tokenizer_class="GPT2Tokenizer")
    export_checkpoint(checkpoint, settings, tmp_path / "hf", "fp32", folder)
    text = "import os\n\ndef main(argv):\n    return os.path.join(argv[1], argv[2])\n"
    context, rest = text[:20], text[20:]
    ids = DocumentEncoder(folder)([text])[0].tolist()[:-1]
    start = len(DocumentEncoder(folder)([context])[0]) - 1
    with torch.no_grad():
        logits = F.log_softmax(model(torch.tensor([ids]))[0], dim=-1)
    losses = [logits[i - 1, ids[i]].item() for i in range(1, len(ids))]

    def language_model(add_bos: bool) -> Any:
        return HFLM(
            str(tmp_path / "hf"), device="cpu", dtype="float32", trust_remote_code=True,
            batch_size=1, max_length=512, add_bos_token=add_bos,
        )  # fmt: skip

    rolling = Instance("loglikelihood_rolling", {}, (text,), 0)
    (found,) = language_model(False).loglikelihood_rolling([rolling], disable_tqdm=True)
    assert found == pytest.approx(sum(losses), rel=1e-5)
    pair = Instance("loglikelihood", {}, (context, rest), 0)
    ((found, _),) = language_model(True).loglikelihood([pair], disable_tqdm=True)
    assert found == pytest.approx(sum(losses[start - 1 :]), rel=1e-5)
