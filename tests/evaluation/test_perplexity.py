"""Windows, spans and intervals, against what they are defined to be."""

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fold_parallel import Grid
from tensorlm.config import load_config
from tensorlm.data.tokenizer.tokenizers import DocumentEncoder
from tensorlm.evaluation.bootstrap import mean_over_documents
from tensorlm.evaluation.model import EvaluatedModel, open_random_model
from tensorlm.evaluation.perplexity import compare_lengths, loss_by_position, window_losses
from tensorlm.evaluation.text import EncodedTexts, Spans, choose_spans
from tensorlm.runtime.errors import UserError
from tests.support.launching import TINY


class Lengths:
    """Documents of given lengths whose tokens are (document, position)."""

    def __init__(self, *lengths: int) -> None:
        self.lengths = np.array(lengths)

    def tokens(self, document: int, start: int, stop: int) -> np.ndarray:
        return 1000 * document + np.arange(start, min(stop, self.lengths[document]))


@pytest.fixture
def model(tmp_path: Path, data: Path) -> EvaluatedModel:
    path = tmp_path / "config.toml"
    path.write_text(TINY.format(run=tmp_path / "run", data=data))
    return open_random_model(load_config(path), torch.device("cpu"), Grid())


@pytest.mark.parametrize(("length", "stride"), [(16, 16), (32, 16), (40, 24), (96, 96)])
def test_every_token_has_its_loss_in_the_window_that_predicts_it(
    model: EvaluatedModel, length: int, stride: int
) -> None:
    rng = np.random.default_rng(0)
    spans = Spans(rng.integers(512, size=(2, 97)), np.array([0, 1]))
    found = window_losses(model, spans, length, stride, "")
    for row, tokens in enumerate(torch.from_numpy(spans.tokens)):
        expected, done = [], 0
        while done < 96:
            stop = length if done == 0 else min(done + stride, 96)
            logits = model.network(tokens[None, stop - length : stop])[0].double()
            log_probability = logits.log_softmax(-1)
            for position in range(done, stop):
                target = tokens[position + 1]
                expected.append(-log_probability[position - (stop - length), target].item())
            done = stop
        np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_spans_come_from_as_many_documents_as_possible_and_never_cross_two() -> None:
    spans = choose_spans(Lengths(40, 9, 21, 10), length=10, max_tokens=50)
    assert spans.document.tolist() == [0, 2, 0, 2, 0]
    for tokens, document in zip(spans.tokens, spans.document, strict=True):
        assert set(tokens // 1000) == {document}
        assert (np.diff(tokens) == 1).all()
        assert len(tokens) == 11
    assert len(np.unique(spans.tokens[:, 1:])) == 50  # each token is predicted once


def test_texts_and_prompts_have_the_ids_that_training_data_has(
    tmp_path: Path, data: Path, model: EvaluatedModel
) -> None:
    texts = ["what <s> and </s> and <unk> mean", "def main():\n    return 'ünïcode'"]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}.txt").write_text(text)
    found = EncodedTexts(str(tmp_path / "*.txt"), model.tokenizer)
    for number, wanted in enumerate(DocumentEncoder(data / "tokenizer")(texts)):
        assert found.tokens(number, 0, 1000).tolist() == wanted.tolist()
        assert model.encode(texts[number]) == wanted.tolist()[:-1]


def test_held_out_records_may_have_another_field(tmp_path: Path, model: EvaluatedModel) -> None:
    source = tmp_path / "a.jsonl"
    source.write_text('{"body": "some words"}\n{"body": "and more", "meta": {"text": "x"}}')
    found = EncodedTexts(str(source), model.tokenizer, "body")
    assert found.tokens(1, 0, 1000).tolist()[:-1] == model.encode("and more")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9")
    (tmp_path / "c.csv").touch()
    (tmp_path / "d.jsonl").write_text('{"text": 3}')
    (tmp_path / "e.jsonl").write_text('{"text": "\\ud800"}')
    (tmp_path / "f.txt.gz").write_bytes(gzip.compress(bytes(1 << 24)) * 17)
    fixes = {
        "a.jsonl": "must have a field 'text' (text fields: body; choose eval.text_field)",
        "b.txt": "choose other files with eval.text)",
        "c.csv": "choose other files with eval.text)",
        "d.jsonl": "choose eval.text_field, or remove the record)",
        "e.jsonl": "or remove the record)",
        "f.txt.gz": "choose other files with eval.text)",
    }
    for name, fix in fixes.items():
        with pytest.raises(UserError) as caught:
            EncodedTexts(str(tmp_path / name), model.tokenizer)
        (line,) = caught.value.problems
        assert line.endswith(fix)
        assert "--" not in line  # those are options of another launcher


def test_a_length_without_a_document_names_the_longest() -> None:
    with pytest.raises(UserError, match=r"a held-out document must have 101 tokens.*at most 40"):
        choose_spans(Lengths(40, 9), length=100, max_tokens=1000)


def test_buckets_hold_the_means_of_their_positions() -> None:
    losses = np.arange(2 * 1024, dtype=float).reshape(2, 1024)
    buckets = loss_by_position(losses, np.array([0, 1]), 512, seed=0)
    assert [(b.start, b.stop) for b in buckets] == [(0, 256), (256, 512)]
    windows = losses.reshape(4, 512)
    assert buckets[1].loss.mean == pytest.approx(windows[:, 256:].mean())
    assert np.mean([b.loss.mean for b in buckets]) == pytest.approx(losses.mean())


def test_interval_is_that_of_documents_not_of_tokens() -> None:
    rng = np.random.default_rng(1)
    level = rng.normal(3.0, 0.5, size=40)  # each document has a level of its own
    values = level[:, None] + rng.normal(0, 0.01, size=(40, 1000))
    found = mean_over_documents(values, np.arange(40), seed=0)
    assert found.mean == pytest.approx(values.mean())
    assert found.low is not None
    assert found.high is not None
    expected = 2 * 1.96 * level.std() / math.sqrt(40)
    assert found.high - found.low == pytest.approx(expected, rel=0.15)
    assert found.low < found.mean < found.high
    assert mean_over_documents(values, np.zeros(40, int), seed=0).low is None  # one document


def test_ratios_compare_the_same_tokens_with_the_trained_length() -> None:
    short = np.full((4, 64), 2.0)
    tables = {16: short + 1, 32: short, 64: short - 0.1}
    (ratio,) = compare_lengths(tables, np.arange(4), 32, seed=0)
    assert (ratio.length, ratio.multiple) == (64, 2)
    assert ratio.ratio.mean == pytest.approx(math.exp(-0.1))
    assert compare_lengths(tables, np.arange(4), 48, seed=0) == []
