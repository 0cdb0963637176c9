"""The tokenizer: transformers' ids on the same folder, BOS by one rule, every token shown, chats as Google has them."""

import json

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from gemmascope.tokenizer import Gemma4Tokenizer, format_chat

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>", "<|think|>"]
MERGES = ["\n \n", "\n\n \n", "t h", "th e", "▁ the", "i n", "in g", "▁ s", "▁s ing", "c at", "a t", "▁ cat", "e r"]
TEXTS = [
    "the cat sings",
    " the cat",
    "the\n\n\nsinging\n\ncat\n",
    "naïve cat 🐈 in a café",  # ï, é and the cat fall back to bytes
    "two  spaces\tand a tab",
    "<|turn>user\nthe cat<turn|>\n",
    "<bos>the cat",
    "▁the",
]


def backend(*, adds_bos: bool) -> Tokenizer:
    """A BPE built like Gemma's: byte fallback, "▁" for a space, newline runs as tokens, no prefix space."""
    pairs = [tuple(merge.split(" ")) for merge in MERGES]
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz<>|\n▁"))
    pieces = SPECIAL + [f"<0x{byte:02X}>" for byte in range(256)] + letters + [a + b for a, b in pairs]
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    single = "<bos> $A" if adds_bos else "$A"
    tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=[("<bos>", 2)])
    return tokenizer


def write(folder, *, adds_bos: bool = True, add_bos_token: bool | None = None, **config) -> None:
    backend(adds_bos=adds_bos).save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>", **config}
    if add_bos_token is not None:
        config["add_bos_token"] = add_bos_token
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def tokenizer(tmp_path) -> Gemma4Tokenizer:
    write(tmp_path)
    return Gemma4Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("add_bos_token", [True, False, None])  # not read, by transformers as by us
def test_ids_and_text_equal_transformers(tmp_path, adds_bos, add_bos_token):
    from transformers import AutoTokenizer

    write(tmp_path, adds_bos=adds_bos, add_bos_token=add_bos_token)
    ours, theirs = Gemma4Tokenizer.from_folder(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        bare = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, add_bos=False) == bare
        assert ours.encode(text) == ours.encode(text, add_special_tokens=adds_bos)
        if not text.startswith("<bos>"):
            assert ours.encode(text) == theirs.encode(text)
        for skip in (True, False):
            assert ours.decode(bare, skip) == theirs.decode(bare, skip_special_tokens=skip)
        assert ours.convert_ids_to_tokens(bare) == theirs.convert_ids_to_tokens(bare)
    batch = TEXTS[:4]
    expected = theirs(batch, padding=True, return_tensors="pt")
    got = ours(batch, return_tensors="pt")
    assert torch.equal(got["input_ids"], expected["input_ids"])
    assert torch.equal(got["attention_mask"], expected["attention_mask"])
    assert ours(batch)["input_ids"] == theirs(batch)["input_ids"]
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "bos_token", "eos_token", "pad_token", "padding_side"):
        assert getattr(ours, name) == getattr(theirs, name)
    assert len(ours) == len(theirs)


def test_bos_never_comes_twice(tokenizer):
    assert tokenizer.encode("<bos>the", add_bos=True) == tokenizer.encode("the", add_bos=True)
    assert tokenizer.encode("<bos>the").count(tokenizer.bos_token_id) == 1
    assert tokenizer.encode("<bos><bos>the").count(tokenizer.bos_token_id) == 2  # written by the user, left alone


def test_a_length_limit_inside_the_file_does_not_cut_prompts(tmp_path):
    limited = backend(adds_bos=False)
    limited.enable_truncation(3)
    limited.enable_padding(length=50)
    limited.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Gemma4Tokenizer.from_folder(tmp_path)
    assert tokenizer.decode(tokenizer.encode("the cat sings in the cafe")) == "the cat sings in the cafe"


def test_to_tokens_pads_on_either_side(tokenizer):
    left = tokenizer.to_tokens(["the cat", "the"])
    right = tokenizer.to_tokens(["the cat", "the"], padding_side="right")
    bos, the, cat = tokenizer.encode("the cat")
    assert left.tolist() == [[bos, the, cat], [0, bos, the]]
    assert right.tolist() == [[bos, the, cat], [bos, the, 0]]
    assert tokenizer.to_tokens("the cat", prepend_bos=False).tolist() == [[the, cat]]
    assert tokenizer.batch(["the cat", "the"])[1].tolist() == [[1, 1, 1], [0, 1, 1]]


def test_every_token_is_shown(tokenizer):
    assert tokenizer.to_str_tokens("the cat\n\nü") == ["<bos>", "the", " cat", "\n\n", "<0xC3>", "<0xBC>"]
    assert tokenizer.to_str_tokens("\t", prepend_bos=False) == ["\t"]  # a byte that is a character by itself
    ids = tokenizer.to_tokens("the cat")
    assert tokenizer.to_str_tokens(ids) == tokenizer.to_str_tokens(ids[0]) == ["<bos>", "the", " cat"]
    assert tokenizer.to_str_tokens(ids[0].tolist()) == ["<bos>", "the", " cat"]
    two = [["<bos>", "the"], ["<bos>", " cat"]]
    assert tokenizer.to_str_tokens(["the", " cat"]) == two
    assert tokenizer.to_str_tokens(tokenizer.to_tokens(["the", " cat"])) == two


def test_to_string_is_the_inverse_of_to_tokens(tokenizer):
    for text in TEXTS[:6]:
        ids = tokenizer.to_tokens(text, prepend_bos=False)
        assert tokenizer.to_string(ids) == [text]
        assert tokenizer.to_string(ids[0]) == tokenizer.to_string(ids[0].tolist()) == text
    assert tokenizer.to_string(tokenizer.bos_token_id) == "<bos>"


def test_tokens_and_ids_convert_both_ways(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0xE2>"])
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁the", "<0xE2>"]
    assert tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids("▁cat")) == "▁cat"
    with pytest.raises(ValueError, match="' the' is not in the vocabulary"):
        tokenizer.convert_tokens_to_ids(" the")


def test_to_single_token(tokenizer):
    assert tokenizer.to_single_token(" cat") == tokenizer.convert_tokens_to_ids("▁cat")
    with pytest.raises(ValueError, match=r"' the cat' is 2 tokens, not one: \[' the', ' cat'\]\."):
        tokenizer.to_single_token(" the cat")
    with pytest.raises(ValueError, match="'sing' is 2 tokens.*starts with a space"):
        tokenizer.to_single_token("sing")
    with pytest.raises(ValueError, match="'' is 0 tokens"):
        tokenizer.to_single_token("")


def test_an_empty_prompt_is_an_error_unless_bos_is_asked_for(tokenizer):
    with pytest.raises(ValueError, match="The prompt is empty: .*prepend_bos=True"):
        tokenizer.to_tokens("")
    with pytest.raises(ValueError, match="Prompt 1 is empty"):
        tokenizer.to_tokens(["the", ""])
    with pytest.raises(ValueError, match="empty list"):
        tokenizer.to_tokens([])
    assert tokenizer.to_tokens("", prepend_bos=True).tolist() == [[tokenizer.bos_token_id]]


@pytest.mark.parametrize("bad", [-1, 10_000])
def test_an_id_outside_the_vocabulary_is_named(tokenizer, bad):
    for method in (tokenizer.decode, tokenizer.to_str_tokens, tokenizer.to_string, tokenizer.convert_ids_to_tokens):
        with pytest.raises(ValueError, match=f"Token id {bad} .* {tokenizer.vocab_size} tokens"):
            method([5, bad])


def test_saved_and_read_back_it_is_the_same(tmp_path):
    write(tmp_path, adds_bos=False, eos_token={"content": "<turn|>"}, custom="kept")
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}")
    first = Gemma4Tokenizer.from_folder(tmp_path)
    (tmp_path / "copy").mkdir()
    first.save(tmp_path / "copy")
    second = Gemma4Tokenizer.from_folder(tmp_path / "copy")
    assert [second.encode(text) for text in TEXTS] == [first.encode(text) for text in TEXTS]
    assert (second.eos_token, second.chat_template, second.config["custom"]) == ("<turn|>", "{{ bos_token }}", "kept")
    assert not second.add_bos


def test_bad_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="No tokenizer.json"):
        Gemma4Tokenizer.from_folder(tmp_path)
    write(tmp_path, bos_token="<start>")
    with pytest.raises(ValueError, match="no BOS token: '<start>'"):
        Gemma4Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json is not readable JSON"):
        Gemma4Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(ValueError, match="tokenizer.json is damaged"):
        Gemma4Tokenizer.from_folder(tmp_path)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


EMPTY_THOUGHT = "<|channel>thought\n<channel|>"
# Rendered with the canonical template of 2026-07-09 for the large models.
CHATS = [
    ([user("Hello.")], {}, f"<bos><|turn>user\nHello.<turn|>\n<|turn>model\n{EMPTY_THOUGHT}"),
    (
        [{"role": "system", "content": "You are a helpful assistant."}, user("Hello.")],
        {},
        "<bos><|turn>system\nYou are a helpful assistant.<turn|>\n<|turn>user\nHello.<turn|>\n<|turn>model\n"
        + EMPTY_THOUGHT,
    ),
    (
        [{"role": "system", "content": " Be brief.\n"}, user("2+2?")],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\nBe brief.<turn|>\n<|turn>user\n2+2?<turn|>\n<|turn>model\n",
    ),
    (
        [user("2+2?")],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\n2+2?<turn|>\n<|turn>model\n",
    ),
    (
        [user("Hi"), {"role": "assistant", "content": "<|channel>thought\nGreet.<channel|>Hello!"}, user("Bye")],
        {"thinking": True},
        "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n"
        "<|turn>user\nBye<turn|>\n<|turn>model\n",
    ),
    (
        [user("Hi"), {"role": "assistant", "content": "Hello!"}],
        {"add_generation_prompt": False},
        "<bos><|turn>user\nHi<turn|>\n<|turn>model\nHello!<turn|>\n",
    ),
]


@pytest.mark.parametrize("messages, options, expected", CHATS)
def test_chats_are_rendered_as_google_does(messages, options, expected):
    assert format_chat(messages, **options) == expected
    # Without the empty thought, which would make the small models leak their reasoning.
    assert format_chat(messages, family="edge", **options) == expected.removesuffix(EMPTY_THOUGHT)


@pytest.mark.parametrize(
    "messages, message",
    [
        ([], "no messages"),
        ([{"role": "tool", "content": "x"}], "Message 0 has the role 'tool'"),
        ([user("x"), {"role": "system", "content": "y"}], "Message 1 has the role 'system'.*first only"),
        ([{"role": "user", "content": [{"type": "image"}]}], "own chat template"),
        ([{"role": "assistant", "content": "x", "tool_calls": []}], r"\['content', 'role', 'tool_calls'\]"),
        ([user("x"), *[{"role": "assistant", "content": "y"}] * 2], "Messages 1 and 2 are both the assistant's"),
    ],
)
def test_chats_beyond_plain_text_are_refused(messages, message):
    with pytest.raises(ValueError, match=message):
        format_chat(messages)


def test_an_unknown_chat_family_is_refused():
    with pytest.raises(ValueError, match="not 'E2B'"):
        format_chat([user("x")], family="E2B")


def test_a_formatted_chat_gets_no_second_bos(tokenizer):
    assert tokenizer.encode(format_chat([user("the cat")])).count(tokenizer.bos_token_id) == 1
