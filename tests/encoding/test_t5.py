"""T5 against its forward pass written out in numpy, its files, and sets of encoded captions."""

import functools
import io
import sys

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxvid import data, prompts
from jaxvid.data import captions, journal, shards, text
from jaxvid.encoding import captions as encoding
from jaxvid.encoding import t5
from jaxvid.errors import UserError
from jaxvid.models.t5 import buckets
from tests.videos import data_config

V, D, A, K, HIDDEN, DEPTH = 40, 12, 2, 5, 14, 2  # heads are not D / A wide, as in the small T5


@functools.cache
def arrays():
    """A state dict of random arrays, with a decoder and the second name of the embeddings."""
    rng, found = np.random.default_rng(0), {}

    def add(name, *shape, mean=0.0):
        found[f"{name}.weight"] = (mean + 0.2 * rng.standard_normal(shape)).astype(np.float32)

    add("shared", V, D)
    for layer in range(DEPTH):
        block = f"encoder.block.{layer}.layer"
        for name in "qkv":
            add(f"{block}.0.SelfAttention.{name}", A * K, D)
        add(f"{block}.0.SelfAttention.o", D, A * K)
        add(f"{block}.0.layer_norm", D, mean=1.0)
        for name, shape in (("wi_0", (HIDDEN, D)), ("wi_1", (HIDDEN, D)), ("wo", (D, HIDDEN))):
            add(f"{block}.1.DenseReluDense.{name}", *shape)
        add(f"{block}.1.layer_norm", D, mean=1.0)
    add("encoder.block.0.layer.0.SelfAttention.relative_attention_bias", 32, A)
    add("encoder.final_layer_norm", D, mean=1.0)
    add("decoder.final_layer_norm", D)
    add("lm_head", V, D)
    found["encoder.embed_tokens.weight"] = found["shared.weight"]
    return found


def bucket(offset):
    """Of key - query, as published: 16 for keys behind, 8 exact distances, then logarithms."""
    distance, behind = abs(offset), 16 * (offset > 0)
    if distance < 8:
        return behind + distance
    return behind + min(8 + int(np.float32(np.log(distance / 8) / np.log(128 / 8)) * 8), 15)


def forward(ids):
    """The encoder, one caption, query and head at a time."""
    w = {name.removesuffix(".weight"): array.astype(float) for name, array in arrays().items()}
    table = w["encoder.block.0.layer.0.SelfAttention.relative_attention_bias"]

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[name]

    x = w["shared"][ids]
    for layer in range(DEPTH):
        block = f"encoder.block.{layer}.layer"
        h, attention = norm(x, f"{block}.0.layer_norm"), f"{block}.0.SelfAttention"
        q, k, v = (h @ w[f"{attention}.{name}"].T for name in "qkv")
        y = np.zeros_like(q)
        for head in range(A):
            own = slice(head * K, (head + 1) * K)
            for i in range(len(ids)):
                bias = [table[bucket(j - i), head] for j in range(len(ids))]
                p = np.exp(k[:, own] @ q[i, own] + bias)
                y[i, own] = p / p.sum() @ v[:, own]
        x = x + y @ w[f"{attention}.o"].T
        h, mlp = norm(x, f"{block}.1.layer_norm"), f"{block}.1.DenseReluDense"
        gate = h @ w[f"{mlp}.wi_0"].T
        gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        x = x + (gate * (h @ w[f"{mlp}.wi_1"].T)) @ w[f"{mlp}.wo"].T
    return norm(x, "encoder.final_layer_norm")


def test_buckets():
    found = buckets(300, 32)
    for query, key in ((0, 0), (7, 0), (0, 7), (8, 0), (0, 16), (32, 0), (0, 64), (200, 72)):
        assert found[query, key] == bucket(key - query)
    assert [bucket(-n) for n in (7, 8, 16, 32, 64, 128, 299)] == [7, 8, 10, 12, 14, 15, 15]
    np.testing.assert_array_equal(found[100], [bucket(key - 100) for key in range(300)])


def test_the_encoder_equals_numpy_and_padding_changes_nothing():
    module, params = t5.import_t5(arrays())
    rng = np.random.default_rng(1)
    lengths = (30, 1, 12)
    ids_BM = np.zeros((3, 30), np.int32)
    for row, length in zip(ids_BM, lengths):
        row[:length] = rng.integers(1, V, length)
    x_BMD = module.apply({"params": params}, ids_BM)
    for x_MD, ids, length in zip(x_BMD, ids_BM, lengths):
        np.testing.assert_allclose(x_MD[:length], forward(ids[:length]), atol=1e-5)
        np.testing.assert_array_equal(x_MD[length:], 0)
    short = module.apply({"params": params}, ids_BM[2:, :12])
    np.testing.assert_allclose(short[0], x_BMD[2, :12], atol=2e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shared.weight": None, "encoder.embed_tokens.weight": None}, "holds no 'encoder.embed_t"),
        (
            {"encoder.block.1.layer.1.DenseReluDense.wo.weight": None},
            "holds no 'encoder.block.1.*w",
        ),
        ({"encoder.final_layer_norm.weight": np.ones(3)}, r"'encoder.final_.* shape \(3,\), not"),
        ({"encoder.block.0.layer.0.SelfAttention.q.bias": np.ones(3)}, "no layer takes encoder.bl"),
        ({"encoder.block.0.layer.1.DenseReluDense.wi.weight": np.ones(3)}, r"is T5 1\.0"),
        ({"encoder.block.0.layer.0.SelfAttention.q.weight": np.ones((9, D))}, "2 heads of 9 chan"),
        ({name: None for name in arrays()}, "holds no 'encoder.block.0"),
    ],
)
def test_files_of_other_networks_are_refused(change, message):
    changed = {name: x for name, x in (arrays() | change).items() if x is not None}
    with pytest.raises(UserError, match=f"^t5: {message}"):
        t5.import_t5(changed)


# Tokenizers and sets


WORDS = ("▁a", "▁red", "▁square", "▁blue", "▁moves", "▁", "r", "e", "d")


def write_json(path, ending=True, pad="<pad>"):
    """A tokenizer of the library tokenizers with the ids of T5."""
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = [(pad, 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((word, -1.0) for word in WORDS)]
    tokenizer = tokenizers.Tokenizer(tokenizers.models.Unigram(vocabulary, unk_id=2))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    if ending:
        tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 1)]
        )
    tokenizer.enable_truncation(2)  # which files of T5 have, and which must not count
    tokenizer.save(str(path))


def write_pieces(path):
    sentencepiece = pytest.importorskip("sentencepiece")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a red square moves", "a blue square"] * 20),
        model_writer=model,
        vocab_size=25,
        hard_vocab_limit=False,
        **dict(pad_id=0, eos_id=1, unk_id=2, bos_id=-1),
        minloglevel=2,
    )
    path.write_bytes(model.getvalue())


def folder(tmp_path):
    """A folder as a user has it, with the weights in two files."""
    path = tmp_path / "t5"
    path.mkdir()
    names = sorted(arrays())
    for number, part in enumerate((names[::2], names[1::2])):
        kept = {name: arrays()[name].copy() for name in part}
        save_file(kept, path / f"model-{number}.safetensors")
    write_json(path / "tokenizer.json")
    return path


def test_tokenizers_end_once_and_are_not_truncated(tmp_path):
    for ending in (True, False):
        write_json(tmp_path / "tokenizer.json", ending)
        tokenize = t5.open_tokenizer(tmp_path / "tokenizer.json")
        assert tokenize("a red square") == [3, 4, 5, 1]
        assert tokenize("") in ([1], [8, 1])


def test_pieces(tmp_path):
    write_pieces(tmp_path / "spiece.model")
    tokenize = t5.open_tokenizer(tmp_path / "spiece.model")
    ids = tokenize("a red square moves")
    assert len(ids) > 4 and ids[-1] == 1 and 1 not in ids[:-1] and min(ids) > 0


@pytest.mark.parametrize("name", ["tokenizer.json", "spiece.model"])
def test_files_that_are_no_tokenizer_are_refused(tmp_path, name, monkeypatch):
    path, library = tmp_path / name, t5.TOKENIZERS[name]
    pytest.importorskip(library)
    for content in (b"", b"\xff\xfe\x00", b"{}", b"a text"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"^text={path}: is no file of {library}") as caught:
            t5.open_tokenizer(path)
        assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=f"needs the library {library}; pip install {library}$"):
        t5.open_tokenizer(path)


def test_other_vocabularies_are_refused(tmp_path):
    write_json(tmp_path / "tokenizer.json", pad="<nothing>")
    with pytest.raises(UserError, match="<pad> and </s> have the ids None and 1, not 0 and 1"):
        t5.open_tokenizer(tmp_path / "tokenizer.json")
    changed = arrays() | {"shared.weight": arrays()["shared.weight"][:5]}
    encoder = t5.T5(*t5.import_t5(changed), lambda caption: [7, 1])
    with pytest.raises(UserError, match=r"^text: the tokenizer gives the ids 1 to 7, and the weig"):
        encoder.encode(["a"], 8)


def test_folders_that_lack_files_are_refused(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    for path, message in ((missing, "no such folder"), (empty, r"holds no \.safetensors")):
        with pytest.raises(UserError, match=f"^text={path}: {message}"):
            t5.open_t5(path)
    save_file({"a": np.ones(2, np.float32)}, empty / "model.safetensors")
    with pytest.raises(UserError, match=r"holds no tokenizer.json or spiece.model"):
        t5.open_t5(empty)


def config(path, **changes):
    fields = dict(text="stored", text_path=str(path), text_tokens=6, text_width=D, text_digest="")
    return data_config("sprites", **fields | changes)


def encoded(tmp_path):
    (tmp_path / "captions.txt").write_text("a red square\n\nA blue\na red square \nmoves\u00e9\n")
    src, out = str(tmp_path / "captions.txt"), tmp_path / "set"
    return encoding.encode(folder(tmp_path), src, out, tokens=5, batch=2), out


def test_a_set_has_each_caption_once_and_is_read_by_caption(tmp_path):
    manifest, out = encoded(tmp_path)
    assert (manifest["captions"], manifest["width"]) == (3, D)
    read = text.reader(config(out))
    row = read("a red square")
    assert (row.shape, row.dtype) == text.shape(config(out))
    np.testing.assert_allclose(row[:4], forward([3, 4, 5, 1]), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(row[4:], 0)
    np.testing.assert_array_equal(read("  "), 0)
    np.testing.assert_array_equal(read("movese\u0301"), read("moves\u00e9"))  # NFD and NFC
    with pytest.raises(UserError, match=r"^text='stored': the caption 'green' is not among the 3"):
        read("green")


def test_prompts_are_looked_up_or_encoded(tmp_path):
    _, out = encoded(tmp_path)
    rows = prompts.read(config(out), ["a blue", "a red square", "", "a" + " red" * 20])
    assert rows.shape == (4, 6, D)
    np.testing.assert_allclose(rows[0, :3], forward([3, 6, 1]), rtol=2e-3, atol=2e-3)
    np.testing.assert_array_equal(rows[1], text.reader(config(out))("a red square"))
    np.testing.assert_array_equal(rows[2], 0)
    np.testing.assert_allclose(rows[3, :5], forward([3, 4, 4, 4, 1]), rtol=2e-3, atol=2e-3)
    for name in ("model-0.safetensors", "tokenizer.json"):
        (tmp_path / "t5" / name).unlink()
        with pytest.raises(UserError, match=r"^prompt='a blue': is not among .* encoder=") as error:
            prompts.read(config(out), ["a blue"])
        assert "\n" not in str(error.value)
    assert prompts.read(config(out), ["a red square"]).any()  # needs no encoder
    with pytest.raises(UserError, match=r"^prompt='\\udcff': is not UTF-8"):
        prompts.read(data_config("sprites", text="bytes", text_tokens=4), ["\udcff"])


def test_batches_of_stored_captions(tmp_path):
    """Sprites whose captions are all stored."""
    fields = dict(num_clips=4, max_sprites=1, threads=1, size=8, frames=2)
    source = data.make_source(config("unused", **fields), "train")
    names = sorted({source.caption(index) for index in range(4)})
    (tmp_path / "captions.txt").write_text("\n".join(names))
    out = tmp_path / "set"
    encoding.encode(folder(tmp_path), str(tmp_path / "captions.txt"), out)
    iterator = data.make_iterator(
        config(out, **fields), split="train", seed=0, batch_size=4, process_index=0, process_count=1
    )
    batch = next(iterator)
    iterator.close()
    read = text.reader(config(out, **fields))
    for row, index in zip(batch["text"], batch["id"]):
        np.testing.assert_array_equal(row, read(source.caption(int(index))))


def test_runs_are_bound_to_the_encoder_and_its_width(tmp_path):
    manifest, out = encoded(tmp_path)
    assert text.binding(config(out)) == {"text_digest": manifest["encoder_digest"]}
    assert text.binding(data_config("sprites")) == {}
    for changes, message in (
        (dict(text_width=9), "^text_width=9: text_path holds embeddings of the width 12; use"),
        (dict(text_digest="0"), "^text_digest='0': text_path holds embeddings of another encoder"),
        (dict(text_path=str(tmp_path)), r"^text_path=.*: holds no dataset\.json; write it with"),
    ):
        with pytest.raises(UserError, match=message):
            text.reader(config(out, **changes))
    with pytest.raises(UserError, match=r"^text_path='': missing; name the set"):
        text.check(config(""))


def test_a_killed_run_resumes(tmp_path, monkeypatch):
    _, whole = encoded(tmp_path)
    monkeypatch.setattr(journal, "SAVE_SECONDS", 0)
    calls, call = [], t5.T5.encode

    def die_at_the_second(encoder, rows, tokens):
        calls.append(rows)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return call(encoder, rows, tokens)

    monkeypatch.setattr(t5.T5, "encode", die_at_the_second)
    src, out = str(tmp_path / "captions.txt"), tmp_path / "again"
    run = functools.partial(encoding.encode, tmp_path / "t5", src, out, tokens=5)
    with pytest.raises(KeyboardInterrupt):
        run(batch=2)
    assert not out.exists()
    with pytest.raises(UserError, match="holds the beginning of another set"):
        run(batch=3)
    run(batch=2)
    assert len(calls) == 3 and calls[1] == calls[2]
    for caption in ("a red square", "A blue", "moves\u00e9"):
        found = [captions.Captions(path).find(caption) for path in (whole, out)]
        np.testing.assert_array_equal(*found)
    assert not list(out.glob("journal*"))
    with pytest.raises(UserError, match=f"^out={out}: exists already"):
        run(batch=2)


def test_a_damaged_set_is_refused(tmp_path):
    _, out = encoded(tmp_path)
    [path] = out.glob("train-*")
    content = bytearray(path.read_bytes())
    content[content.index(b"a red square") + 40] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"{shards.COPY}$"):
        text.reader(config(out))("a red square")
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"^text_path=.* has \d+ bytes, .*{shards.COPY}$"):
        text.reader(config(out))


def test_captions_of_sources(tmp_path):
    for name in ("b/x", "a/y"):
        (tmp_path / "clips" / name).parent.mkdir(parents=True)
        (tmp_path / "clips" / f"{name}.mp4").write_bytes(b"")
    assert sorted(encoding.find(str(tmp_path / "clips"))) == ["a", "b"]
    (tmp_path / "bad.txt").write_bytes(b"a\n\xff")
    (tmp_path / "empty.txt").write_text("\n \n")
    for src, message in (
        ("bad.txt", "is not UTF-8; use a text file"),
        ("empty.txt", "holds no captions"),
        ("nothing", "no such directory"),
    ):
        with pytest.raises(UserError, match=f"^src=.*{src}.*: {message}"):
            encoding.find(str(tmp_path / src))
