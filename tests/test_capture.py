"""Captured activations: q, k, v of every layer, as the model's own attention saw them, and as the fidelity task reads them."""

import json
from types import SimpleNamespace

import pytest
import torch
from cli_support import answer, call
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from attnbench import checkpoint, inputs
from attnbench.capture import capture, save
from attnbench.errors import UserError
from attnbench.method import Shape
from attnbench.nn import Architecture, TinyTransformer
from attnbench.pretrained import _text

SIZES = {"vocabulary": 8192, "classes": 8192, "tokens": 64, "dim": 32, "heads": 2, "depth": 3, "per_token": True}


def model_of(method="softmax", **changes):
    torch.manual_seed(0)
    return TinyTransformer(Architecture(method=method, **{**SIZES, **changes})).eval()


@pytest.fixture
def trained(tmp_path):
    model = model_of()
    path = tmp_path / "model.pt"
    checkpoint.save(path, {"architecture": model.architecture.as_dict(), "task": "mqar", "model": model.state_dict()})
    return path


@pytest.mark.parametrize(("method", "causal"), [("softmax", False), ("softmax", True), ("agent", False)])
def test_a_layer_is_seen_once_with_what_its_operator_is_given(method, causal):
    model = model_of(method, causal=causal)
    tokens = torch.randint(8192, (2, 64))
    before = model.features(tokens)
    seen, outputs = capture(model, lambda: outputs_of(model, tokens)), outputs_of(model, tokens)
    assert [x.layer for x in seen] == [f"blocks.{i}.attention" for i in range(3)]
    for layer, block, output in zip(seen, model.blocks, outputs, strict=True):
        assert layer.q.shape == layer.k.shape == layer.v.shape == (2, 2, 64, 16)
        assert (layer.causal, layer.masked) == (causal, False)
        torch.testing.assert_close(block.attention.operator(layer.q, layer.k, layer.v), output)
    assert torch.equal(model.features(tokens), before), "hooks are gone and changed nothing"
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def outputs_of(model, tokens):
    """What each operator returns."""
    found = []
    hooks = [block.attention.operator.register_forward_hook(lambda *x: found.append(x[2].detach())) for block in model.blocks]
    model.features(tokens)
    for hook in hooks:
        hook.remove()
    return found


class Foreign(nn.Module):
    """Attention as other libraries call it."""

    def __init__(self, **call):
        super().__init__()
        self.inner, self.call = nn.Linear(16, 48), call

    def forward(self, x):
        q, k, v = self.inner(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return scaled_dot_product_attention(q, k, v, **self.call).transpose(1, 2).flatten(2)


LOWER = torch.ones(10, 10, dtype=torch.bool).tril()
WINDOW = LOWER & LOWER.flip(0, 1)


@pytest.mark.parametrize(
    ("options", "causal", "masked"),
    [
        ({}, False, False),
        ({"is_causal": True}, True, False),
        ({"attn_mask": LOWER}, True, False),
        ({"attn_mask": torch.zeros(10, 10).masked_fill(~LOWER, torch.finfo(torch.float32).min)}, True, False),
        ({"attn_mask": torch.ones(1, 1, 10, 10, dtype=torch.bool)}, False, False),
        ({"attn_mask": torch.zeros(1, 1, 10, 10)}, False, False),
        ({"attn_mask": WINDOW}, False, True),
        ({"attn_mask": LOWER * torch.randn(10, 10)}, False, True),
        ({"scale": 0.7}, False, False),
    ],
)
def test_calls_of_other_libraries_are_seen_with_their_mask_and_scale(options, causal, masked):
    model = nn.Sequential(Foreign(**options), nn.Linear(16, 16), Foreign(**options))
    x = torch.randn(3, 10, 16)
    seen = capture(model, lambda: model(x))
    assert [(y.layer, y.causal, y.masked) for y in seen] == [("0", causal, masked), ("2", causal, masked)]
    if not masked:
        got = scaled_dot_product_attention(seen[0].q, seen[0].k, seen[0].v, is_causal=causal)
        torch.testing.assert_close(got.transpose(1, 2).flatten(2), model[0](x))


def test_a_module_that_runs_twice_makes_two_layers_and_one_that_fails_leaves_no_hook():
    layer = Foreign()
    model = nn.Sequential(layer, layer)
    assert [x.layer for x in capture(model, lambda: model(torch.randn(1, 10, 16)))] == ["0", "0#2"]
    with pytest.raises(RuntimeError):
        capture(model, lambda: model(torch.randn(1, 10, 99)))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_model_without_attention_says_so():
    with pytest.raises(UserError, match="no attention that can be captured"):
        capture(nn.Linear(2, 2), lambda: None)


def test_the_input_profile_reads_what_was_saved(tmp_path):
    model = model_of()
    seen = capture(model, lambda: model.features(torch.randint(8192, (2, 64))))
    paths = save(seen, tmp_path / "new", "a model")
    assert [p.name for p in paths] == [f"{i}-blocks.{i}.attention.safetensors" for i in range(3)]
    read = inputs.draw(f"file:{paths[1]}", Shape(2, 2, 64, 16), 0, torch.float32, "cpu")
    assert all(torch.equal(a, b) for a, b in zip(read, (seen[1].q, seen[1].k, seen[1].v), strict=True))
    header = paths[1].read_bytes()
    size = int.from_bytes(header[:8], "little")
    about = json.loads(header[8 : 8 + size])["__metadata__"]
    assert about == {"model": "a model", **{k: str(v) for k, v in seen[1].facts().items()}}


def test_what_cannot_be_written_leaves_nothing_half_done(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    model = model_of()
    seen = capture(model, lambda: model.features(torch.randint(8192, (1, 64))))
    with pytest.raises(UserError, match="cannot write"):
        save(seen, blocked, "")
    assert list(tmp_path.iterdir()) == [blocked]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"architecture": {"depth": 5}}, "holds weights of another architecture than it says"),
        ({"architecture": {"more": 1}}, "is of another version of attnbench"),
        ({"architecture": {"method": "nosuch"}}, "unknown method 'nosuch'"),
        ({"architecture": {"dim": 33}}, "num_heads = 2 does not divide dim = 33"),
        ({"task": "nosuch"}, "unknown trained task 'nosuch'"),
        ({"task": "images"}, "give it with --data PATH"),
    ],
)
def test_a_checkpoint_of_something_else_is_one_line(trained, tmp_path, change, words):
    state = checkpoint.load(trained)
    for key, value in change.items():
        state[key] = {**state[key], **value} if isinstance(value, dict) else value
    checkpoint.save(trained, state)
    result = call("capture", trained, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2, result.output
    assert words in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_the_command_captures_a_checkpoint_on_the_test_split_of_its_task(trained, tmp_path):
    rows = answer("capture", trained, "--out", tmp_path / "out", "--batch", 2, "--device", "cpu", "--json")
    assert [row["layer"] for row in rows] == [f"blocks.{i}.attention" for i in range(3)]
    assert all((row["batch"], row["heads"], row["n"], row["dim"]) == (2, 2, 64, 16) for row in rows)
    lines = call("capture", trained, "--out", tmp_path / "again", "--batch", 2, "--device", "cpu").stdout.splitlines()
    for row, line in zip(rows, lines, strict=True):
        a, b = (inputs.draw(f"file:{path}", Shape(2, 2, 64, 16), 0, torch.float32, "cpu") for path in (row["path"], line))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("nowhere", {}, "no checkpoint and no folder with a config.json"),
        ("folder", {"config.json": "{"}, "cannot read"),
        ("folder", {"config.json": "{}"}, "names no model_type"),
        ("file.pt", {"file.pt": "no"}, "no checkpoint, or is damaged"),
        ("file.pt", {"file.pt": "root:x:0:0:root:/root:/bin/bash\n"}, "no checkpoint, or is damaged"),
    ],
)
def test_what_is_no_model_is_said_in_one_line(tmp_path, name, files, words):
    for file, text in files.items():
        path = tmp_path / (file if name == file else f"{name}/{file}")
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    result = call("capture", tmp_path / name, "--out", tmp_path / "out", "--device", "cpu")
    assert result.exit_code == 2
    assert words in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    ("own", "words"),
    [
        (nn.Linear(2, 2), "is no checkpoint, or is damaged: give one that this version of attnbench wrote"),
        (nn.Linear(2, 2).state_dict(), "is no checkpoint of this version: give one that this version of attnbench wrote"),
    ],
)
@pytest.mark.parametrize("command", [["capture"], ["plot", "--kept"]], ids=lambda x: x[0])
def test_nobody_is_told_to_delete_a_model_of_their_own(tmp_path, command, own, words):
    path = tmp_path / "own.pt"
    torch.save(own, path)
    result = call(*command, path, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [f"error: {path} {words}"]


@pytest.mark.parametrize("library", ["transformers", "timm"])
def test_an_absent_library_is_named(monkeypatch, tmp_path, library):
    monkeypatch.setitem(__import__("sys").modules, library, None)
    result = call("capture", f"{library}:some/model", "--out", tmp_path, "--device", "cpu")
    assert result.exit_code == 2
    assert f"pip install 'attnbench[{library}]'" in result.stderr


def test_texts_fill_batches_without_padding(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("a b c d e f g")
    words = lambda text, **_: {"input_ids": [ord(x) for x in text.split()]}  # noqa: E731
    assert _text(words, path, 2, 3).tolist() == [[97, 98, 99], [100, 101, 102]]
    with pytest.raises(UserError, match="7 tokens, fewer than 2 x 4"):
        _text(words, path, 2, 4)
    with pytest.raises(UserError, match="--data FILE"):
        _text(SimpleNamespace(), None, 1, 1)


def test_an_encoder_of_transformers_is_captured_by_its_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="an optional library, too large for the other tests")
    sizes = {"vocab_size": 99, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    transformers.BertModel(transformers.BertConfig(**sizes, max_position_embeddings=48)).save_pretrained(tmp_path / "bert")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
    (tmp_path / "text.txt").write_text("a b c d e f g h " * 16)
    command = ("capture", tmp_path / "bert", "--out", tmp_path / "out", "--data", tmp_path / "text.txt", "--device", "cpu")
    rows = answer(*command, "--batch", 2, "--json")
    assert [(row["batch"], row["heads"], row["n"], row["dim"], row["causal"], row["masked"]) for row in rows] == [
        (2, 4, 48, 8, False, False)
    ] * 2
    assert call(*command, "--n", 64).exit_code == 2
