"""Text to token ids and back, by the checkpoint's own `tokenizer.json`; and Gemma 4's chat format.

The tokenizer is a BPE with byte fallback: a space is written "▁", a character without a token of its own becomes one
token per UTF-8 byte, a run of newlines is one token.

Whether BOS is added follows one rule, transformers' own: the post-processor inside tokenizer.json says, and
`add_bos_token` in tokenizer_config.json is not read. Google's base checkpoints add BOS and talk nonsense without it (so
do copies of their first-day files, which lack the rule: pass prepend_bos=True there). The instruction-tuned ones do not
add it: the chat template writes it. Unlike in transformers, a text that starts with BOS never gets a second one.
"""

import json
import re
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from tokenizers import Tokenizer
from torch import Tensor

Ids = int | list[int] | Int[Tensor, "..."]


class Gemma4Tokenizer:
    """A `tokenizers.Tokenizer` that knows its BOS, EOS and PAD, pads batches, and shows single tokens as text.

    Has the attributes and methods of a transformers tokenizer that TransformerLens and its users touch.
    """

    def __init__(self, backend: Tokenizer, config: dict | None = None, chat_template: str | None = None):
        """`config` is the content of tokenizer_config.json, `chat_template` a Jinja text.

        Raises:
            ValueError: if the vocabulary lacks the BOS, EOS or PAD token.
        """
        # A length limit or padding saved inside tokenizer.json would cut or stretch prompts unseen.
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.config = config or {}
        self.chat_template = chat_template or self.config.get("chat_template")
        self.padding_side: Literal["left", "right"] = "left"
        self.bos_token, self.bos_token_id = self._special("bos")
        self.eos_token, self.eos_token_id = self._special("eos")
        self.pad_token, self.pad_token_id = self._special("pad")
        self.add_bos: bool = backend.encode("").ids[:1] == [self.bos_token_id]

    def _special(self, kind: str) -> tuple[str, int]:
        token = self.config.get(f"{kind}_token") or f"<{kind}>"
        token = token["content"] if isinstance(token, dict) else token
        token_id = self.backend.token_to_id(token)
        if token_id is None:
            raise ValueError(f"The tokenizer has no {kind.upper()} token: {token!r} is not in its vocabulary.")
        return token, token_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Gemma4Tokenizer":
        """Reads tokenizer.json and, where they are there, tokenizer_config.json and chat_template.jinja.

        Raises:
            FileNotFoundError: if there is no tokenizer.json.
            ValueError: if a file cannot be read as what it should be.
        """
        path = Path(folder) / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"No tokenizer.json in {folder}: gemmascope reads tokenizers in that format only.")
        try:
            backend = Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # tokenizers raises nothing more precise
            raise ValueError(f"{path} is damaged or not a tokenizer: {error}.") from error
        config, template = path.with_name("tokenizer_config.json"), path.with_name("chat_template.jinja")
        try:
            settings = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else {}
        except ValueError as error:
            raise ValueError(f"{config} is not readable JSON: {error}.") from error
        return cls(backend, settings, template.read_text(encoding="utf-8") if template.is_file() else None)

    def save(self, folder: str | Path) -> None:
        """Writes the files that `from_folder`, and transformers, read."""
        folder = Path(folder)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {"tokenizer_class": "GemmaTokenizer", "padding_side": "left", **self.config}
        config |= {"bos_token": self.bos_token, "eos_token": self.eos_token, "pad_token": self.pad_token}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        if self.chat_template is not None:
            (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")

    # Text to ids

    def encode(self, text: str, add_bos: bool | None = None, *, add_special_tokens: bool | None = None) -> list[int]:
        """The ids of one text. `add_bos=None` follows the checkpoint's rule.

        `add_special_tokens` is transformers' word for `add_bos`.

        Raises:
            ValueError: for a text that holds half a character (a byte that was no UTF-8, from a shell or a file).
        """
        if (half := re.search("[\ud800-\udfff]", text)) is not None:
            raise ValueError(
                f"The text holds {half[0]!r} at character {half.start()}, which is no character: decode it as UTF-8."
            )
        ids = self.backend.encode(text, add_special_tokens=False).ids
        choice = add_special_tokens if add_bos is None else add_bos
        wants_bos = self.add_bos if choice is None else choice
        return [self.bos_token_id, *ids] if wants_bos and ids[:1] != [self.bos_token_id] else ids

    def batch(
        self, texts: str | list[str], add_bos: bool | None = None, padding_side: Literal["left", "right"] | None = None
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
        """Token ids and attention mask (1 = a token, 0 = padding) of several texts, padded to the longest.

        Raises:
            ValueError: for an empty list, or an empty text unless `add_bos=True` asks for BOS alone.
        """
        texts = [texts] if isinstance(texts, str) else texts
        if not texts:
            raise ValueError("The prompt is an empty list: give a string or a list of strings.")
        if "" in texts and not add_bos:
            which = f"Prompt {texts.index('')}" if len(texts) > 1 else "The prompt"
            raise ValueError(f"{which} is empty: give some text, or prepend_bos=True for {self.bos_token} alone.")
        side = padding_side or self.padding_side
        rows = [torch.tensor(self.encode(text, add_bos)) for text in texts]
        ids = torch.nn.utils.rnn.pad_sequence(rows, True, self.pad_token_id, padding_side=side)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in rows], True, 0, padding_side=side)
        return ids, mask

    def __call__(
        self,
        text: str | list[str],
        *,
        add_special_tokens: bool | None = None,
        return_tensors: Literal["pt"] | None = None,
    ) -> dict:
        """`input_ids` and `attention_mask`, as a transformers tokenizer gives them.

        Padded tensors [batch, pos] with `return_tensors="pt"`, else lists, unpadded.
        """
        if return_tensors == "pt":
            ids, mask = self.batch(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": mask}
        if isinstance(text, str):
            row = self.encode(text, add_special_tokens)
            return {"input_ids": row, "attention_mask": [1] * len(row)}
        rows = [self.encode(t, add_special_tokens) for t in text]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    # Ids to text

    def decode(self, ids: Ids, skip_special_tokens: bool = False) -> str:
        """The text of one sequence of ids.

        Raises:
            ValueError: for an id that is not in the vocabulary.
        """
        return self.backend.decode(self._checked(ids), skip_special_tokens=skip_special_tokens)

    def batch_decode(
        self, batch: list[list[int]] | Int[Tensor, "batch pos"], skip_special_tokens: bool = False
    ) -> list[str]:
        """`decode` of each row."""
        return [self.decode(ids, skip_special_tokens) for ids in batch]

    def convert_ids_to_tokens(self, ids: Ids) -> str | list[str]:
        """The vocabulary's own spelling: "▁the", "<0xE2>". One string for one int."""
        tokens = [self.backend.id_to_token(i) for i in self._checked(ids)]
        return tokens[0] if isinstance(ids, int) else tokens

    def convert_tokens_to_ids(self, tokens: str | list[str]) -> int | list[int]:
        """The inverse of `convert_ids_to_tokens`.

        Raises:
            ValueError: for a spelling that is not in the vocabulary.
        """
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.backend.token_to_id(tokens)
        if token_id is None:
            raise ValueError(f"{tokens!r} is not in the vocabulary, where a space is '▁'; for text, use encode.")
        return token_id

    def _checked(self, ids: Ids) -> list[int]:
        ids = torch.as_tensor(ids).reshape(-1).tolist()
        for i in ids:
            if i < 0 or self.backend.id_to_token(i) is None:
                raise ValueError(f"Token id {i} is not in the vocabulary of {self.vocab_size} tokens.")
        return ids

    @property
    def vocab_size(self) -> int:
        """Tokens in all, special ones included."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def __len__(self) -> int:
        return self.vocab_size

    # TransformerLens's four, which HookedGemma4 hands on

    def to_tokens(
        self,
        input: str | list[str],
        prepend_bos: bool | None = None,
        padding_side: Literal["left", "right"] | None = None,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one or more texts; see `batch`."""
        return self.batch(input, prepend_bos, padding_side)[0]

    def to_str_tokens(
        self, input: str | list[str] | list[int] | Int[Tensor, "..."], prepend_bos: bool | None = None
    ) -> list[str] | list[list[str]]:
        """The text of every single token; a lone byte of a longer character is shown as "<0xE2>".

        A text, a list of ids or a tensor [pos] or [1, pos] gives one list, several texts or rows a list each.
        """
        if isinstance(input, str):
            input = self.encode(input, prepend_bos)
        elif isinstance(input, list) and any(isinstance(item, str) for item in input):
            return [self.to_str_tokens(text, prepend_bos) for text in input]
        ids = input if isinstance(input, Tensor) else torch.tensor(input, dtype=torch.long)
        if ids.ndim == 2 and len(ids) > 1:
            return [self.to_str_tokens(row) for row in ids]
        return [self._show(i) for i in self._checked(ids)]

    def _show(self, token_id: int) -> str:
        text = self.backend.decode([token_id], skip_special_tokens=False)
        return self.backend.id_to_token(token_id) if "\ufffd" in text else text

    def to_string(self, tokens: Ids) -> str | list[str]:
        """The text of ids [pos], special tokens included; one text a row of ids [batch, pos]."""
        tokens = tokens if isinstance(tokens, Tensor) else torch.tensor(tokens, dtype=torch.long)
        return self.batch_decode(tokens) if tokens.ndim == 2 else self.decode(tokens)

    def to_single_token(self, text: str) -> int:
        """The id of a text that is one token.

        Raises:
            ValueError: if it is none or several, saying how it was split.
        """
        ids = self.encode(text, add_bos=False)
        if len(ids) != 1:
            hint = "" if text.startswith(" ") else " (a word inside a sentence starts with a space)"
            raise ValueError(f"{text!r} is {len(ids)} tokens, not one: {self.to_str_tokens(ids)}{hint}.")
        return ids[0]


_THOUGHT = re.compile(r"<\|channel>.*?(?:<channel\|>|\Z)|<channel\|>", re.DOTALL)


def format_chat(
    messages: list[dict],
    *,
    thinking: bool = False,
    family: str = "large",
    add_generation_prompt: bool = True,
) -> str:
    """A conversation in the format that the instruction-tuned Gemma 4 models were trained on, BOS included.

    `messages` is a list of {"role", "content"} with the roles system (first only), user and assistant. Thoughts in
    earlier answers are dropped, as in Google's template (version of 2026-07-09). With `thinking` off, the prompt of the
    "large" family (12B, 26B-A4B, 31B) ends in an empty thought; that of the "edge" family (E2B, E4B) must not.

    Raises:
        ValueError: for anything beyond that (tools, reasoning, images), which the checkpoint's own template renders.
    """
    if family not in ("large", "edge"):
        raise ValueError(f'The family is "large" (12B, 26B-A4B, 31B) or "edge" (E2B, E4B), not {family!r}.')
    if not messages:
        raise ValueError('There are no messages: give at least one, such as {"role": "user", "content": "Hello."}.')
    for place, message in enumerate(messages):
        _check_message(message, place, messages[place - 1]["role"] if place else None)
    system, turns = "", messages
    if messages[0]["role"] == "system":
        system, turns = messages[0]["content"].strip(), messages[1:]
    text = "<bos>"
    if thinking or turns is not messages:
        text += "<|turn>system\n" + ("<|think|>\n" if thinking else "") + system + "<turn|>\n"
    for turn in turns:
        if turn["role"] == "assistant":
            text += "<|turn>model\n" + _THOUGHT.sub("", turn["content"]).strip() + "<turn|>\n"
        else:
            text += "<|turn>user\n" + turn["content"].strip() + "<turn|>\n"
    if add_generation_prompt:
        text += "<|turn>model\n" + ("<|channel>thought\n<channel|>" if family == "large" and not thinking else "")
    return text


def _check_message(message: dict, place: int, previous: str | None) -> None:
    remedy = "render the conversation with the checkpoint's own chat template (tokenizer.chat_template)"
    if set(message) != {"role", "content"} or not isinstance(message["content"], str):
        raise ValueError(f"Message {place} has {sorted(message)}, not a role and a text as content: {remedy}.")
    role = message["role"]
    if role not in ("system", "user", "assistant") or (role == "system" and place):
        raise ValueError(f"Message {place} has the role {role!r}; accepted are system (first only), user, assistant.")
    if role == "assistant" == previous:
        raise ValueError(f"Messages {place - 1} and {place} are both the assistant's: join them, or {remedy}.")
