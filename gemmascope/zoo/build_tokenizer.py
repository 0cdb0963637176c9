"""The shipped models' tokenizer: Gemma's kind of BPE over the corpus's own words.

As in Gemma: a space becomes "▁", nothing is put before the text, no word pre-tokenizer has any effect (the split is on
spaces, and after normalising there are none), bytes stand in for unknown characters, runs of newlines are single
tokens. No merge joins across the start of a word, so cutting the text into words first gives the same tokens.
"""

import json
import string

from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from gemmascope.zoo.corpus import BOS, vocabulary

TOKENIZER_CONFIG = {
    "tokenizer_class": "GemmaTokenizer",
    "add_bos_token": True,
    "add_eos_token": False,
    "bos_token": "<bos>",
    "eos_token": "<eos>",
    "mask_token": "<mask>",
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "sot_token": "<|turn>",
    "eot_token": "<turn|>",
    "padding_side": "left",
    "clean_up_tokenization_spaces": False,
}
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<|turn>", "<turn|>")


def build_tokenizer() -> Tokenizer:
    """Trains the tokenizer; the same words give the same ids, every time."""
    trained = Tokenizer(BPE())
    alphabet = sorted({*string.ascii_letters, *string.digits, *string.punctuation, "\n", "\t", "▁"})
    trainer = BpeTrainer(vocab_size=1_000_000, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([word.replace(" ", "▁") for word in vocabulary()], trainer)
    model = json.loads(trained.to_str())["model"]

    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    order = [*SPECIAL_TOKENS, *byte_tokens, *sorted(model["vocab"], key=model["vocab"].get)]
    ids = {piece: i for i, piece in enumerate(order)}
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Tokenizer(BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", behavior="merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos>:1 $B:1", special_tokens=[("<bos>", BOS)]
    )
    return tokenizer
