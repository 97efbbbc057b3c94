"""A complete, tiny, untrained model in FLUX.1's format: same files, same classes, same loading code, a few MB.

It proves plumbing, not pictures: its weights are random, though scaled so that signals neither vanish nor explode.
"""

import io
import itertools
import json
import os
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np

from cache import digest, write_atomically
from pipeline.errors import UserError
from pipeline.flux.weights import name_in_file

CLIP_LENGTH = 77
PIECES = 256
"""Most pieces of the T5 vocabulary, without its 100 sentinel tokens; CLIP has 512 bytes and up to as many merges."""


def write_tiny_model(
    folder: Path, seed: int = 0, guidance_embeds: bool = True, blocks: tuple[int, int] = (2, 2), width: int = 128
) -> Path:
    """Write the model to ``folder``, which must not exist or be empty.  Same seed, same bytes.

    guidance_embeds: True for FLUX.1-dev's format, False for FLUX.1-schnell's.  blocks: double and single ones of the
    transformer, FLUX.1's are 19 and 38.  width: of the transformer, a multiple of 32.  Needs `device.use` before.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder}: exists and is not empty; choose another folder, or delete it first")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
        part = Path(temporary) / "model"
        part.mkdir()
        vocabularies = _write_tokenizers(part)
        models = _models(transformer(*blocks, width, guidance_embeds), *vocabularies)
        _write_models(part, seed, models)
        write_scheduler(part, dynamic=guidance_embeds)
        write_index(part)
        follow_umask(part)
        if folder.exists():
            folder.rmdir()
        os.rename(part, folder)
    return folder


def write_index(folder: Path) -> None:
    classes = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    _write_json(folder / "model_index.json", {"_class_name": "FluxPipeline", "_diffusers_version": "0.35.2", **classes})


def _write_json(path: Path, document: dict) -> None:
    write_atomically(path, json.dumps(document, indent=2, sort_keys=True) + "\n")


def write_scheduler(folder: Path, dynamic: bool) -> None:
    (folder / "scheduler").mkdir(exist_ok=True)
    settings = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000}
    settings |= {"use_dynamic_shifting": dynamic, "shift": 3.0 if dynamic else 1.0}
    settings |= {"base_shift": 0.5, "max_shift": 1.15}
    settings |= {"base_image_seq_len": 256, "max_image_seq_len": 4096}
    _write_json(folder / "scheduler" / "scheduler_config.json", settings)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def corpus() -> list[str]:
    """A few thousand captions over a small vocabulary, in a fixed order."""
    colours = "red green blue yellow purple orange black white grey brown pink".split()
    things = "circle square triangle cat dog bird flower tree house car boat cup chair face hand ball".split()
    places = "on a table, in the grass, on a street, in a room, by the sea, in the snow, against the sky".split(", ")
    styles = "a photo of, a painting of, a drawing of, a close up of, a portrait of, an old picture of".split(", ")
    choices = itertools.product(styles, colours, things, places)
    lines = [f"{style} a {colour} {thing} {place}" for style, colour, thing, place in choices]
    return lines + [f"a {a} {thing} on a {b} background" for a in colours for b in colours for thing in things[:6]]


def _write_tokenizers(folder: Path) -> tuple[int, int, int]:
    """Train both tokenizers on `corpus`.  Returns CLIP's vocabulary size and end token, and T5's vocabulary size."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    clip = write_clip_tokenizer(folder / "tokenizer", corpus())
    return (*clip, write_t5_tokenizer(folder / "tokenizer_2", _unigram_pieces()))


def write_clip_tokenizer(folder: Path, lines: list[str]) -> tuple[int, int]:
    """CLIP's byte-level BPE: words end in ``</w>``; the end token, also the padding, has the highest id.

    Every word of ``lines`` becomes one token.  Returns the vocabulary's size and the end token.
    """
    from tokenizers import pre_tokenizers
    from transformers import CLIPTokenizerFast

    merges = _merges(Counter(word for line in lines for word in line.split()))
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = letters + [letter + "</w>" for letter in letters] + ["".join(pair) for pair in merges]
    tokens = list(dict.fromkeys(tokens)) + ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    write_atomically(folder / "vocab.json", json.dumps(vocabulary, ensure_ascii=False))
    write_atomically(folder / "merges.txt", "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    tokenizer = CLIPTokenizerFast(
        vocab_file=str(folder / "vocab.json"), merges_file=str(folder / "merges.txt"), model_max_length=CLIP_LENGTH
    )
    tokenizer.save_pretrained(str(folder))
    return len(tokens), len(tokens) - 1


def _merges(words: Counter) -> list[tuple[str, str]]:
    """Byte pair encoding (arXiv:1508.07909) of ASCII words: join the most frequent pair until every word is one piece.

    The trainer in tokenizers breaks ties by the order of a hash map, another one each time; here spelling does.
    """
    merges: list[tuple[str, str]] = []
    pieces = {word: [*word[:-1], f"{word[-1]}</w>"] for word in words}
    while True:
        counts: Counter[tuple[str, str]] = Counter()
        for word, parts in pieces.items():
            for pair in itertools.pairwise(parts):
                counts[pair] += words[word]
        if not counts:
            return merges
        merges.append(max(counts, key=lambda pair: (counts[pair], pair)))
        pieces = {word: _joined(parts, merges[-1]) for word, parts in pieces.items()}


def _joined(parts: list[str], pair: tuple[str, str]) -> list[str]:
    joined: list[str] = []
    for part in parts:
        if joined and (joined[-1], part) == pair:
            joined[-1] += part
        else:
            joined.append(part)
    return joined


def write_t5_tokenizer(folder: Path, pieces: list[tuple[str, float]]) -> int:
    """T5's Unigram model over ``▁``-marked words, with ``</s>`` at the end and the 100 sentinels it is known for.

    pieces: with their log-probabilities, padding, end and unknown first.  Returns the vocabulary's size.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import T5TokenizerFast

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    fast = T5TokenizerFast(tokenizer_object=tokenizer, model_max_length=512)
    fast.save_pretrained(str(folder))
    return len(fast)


def _unigram_pieces() -> list[tuple[str, float]]:
    """Pieces and log-probabilities, trained on one thread by sentencepiece: the same each time."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()),
        model_writer=model,
        vocab_size=PIECES,
        hard_vocab_limit=False,
        required_chars="".join(chr(code) for code in range(33, 127)),
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    trained = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    return [(trained.id_to_piece(i), trained.get_score(i)) for i in range(trained.get_piece_size())]


# --- models -------------------------------------------------------------------------------------------------------


def _write_models(folder: Path, seed: int, models: dict) -> None:
    for component, model in models.items():
        randomize(model, component, seed)
        model.save_pretrained(str(folder / component), safe_serialization=True)
        _use_pytorch_names(next((folder / component).glob("*.safetensors")))


def _use_pytorch_names(path: Path) -> None:
    """Rename MindSpore's own parameter names, which mindone saves, to those that FLUX.1's files have."""
    from safetensors.numpy import load_file, save_file

    tensors = {name_in_file(name): tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def _models(transformer, clip_size: int, clip_end: int, t5_size: int) -> dict:
    return {
        "text_encoder": _clip(clip_size, clip_end),
        "text_encoder_2": _t5(t5_size),
        "vae": _vae(),
        "transformer": transformer,
    }


def _clip(vocab_size: int, end: int):
    from mindone.transformers import CLIPTextModel
    from transformers import CLIPTextConfig

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    return CLIPTextModel(CLIPTextConfig(vocab_size=vocab_size, max_position_embeddings=CLIP_LENGTH, **sizes, **tokens))


def _t5(vocab_size: int):
    from mindone.transformers import T5EncoderModel
    from transformers import T5Config

    sizes = {"d_model": 96, "d_kv": 24, "d_ff": 192, "num_layers": 2, "num_heads": 4}
    return T5EncoderModel(T5Config(vocab_size=vocab_size, feed_forward_proj="gated-gelu", **sizes))


def _vae():
    """FLUX.1's autoencoder in small: factor 8, 16 latent channels, no quantisation convolutions."""
    from mindone.diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def transformer(num_double: int = 2, num_single: int = 2, width: int = 128, guidance_embeds: bool = True):
    """Double and single blocks of ``width``, a multiple of 32; not yet randomized."""
    from mindone.diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        num_layers=num_double,
        num_single_layers=num_single,
        attention_head_dim=32,
        num_attention_heads=width // 32,
        joint_attention_dim=96,
        pooled_projection_dim=64,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 14, 14),
    )


def randomize(model, component: str, seed: int) -> None:
    """Set every parameter from a generator of its own, keyed by seed and name."""
    import mindspore as ms

    for parameter in model.get_parameters():
        key = int(digest(f"{component}/{parameter.name}/{seed}".encode()), 16)
        value = random_weight(parameter.name, parameter.shape, np.random.Generator(np.random.Philox(key=key)))
        parameter.set_data(ms.Tensor(value.astype(np.float32)))
    if component == "vae":
        _tame_posterior(model)


def random_weight(name: str, shape: tuple, generator: np.random.Generator) -> np.ndarray:
    """Norm weights 1, biases 0, all else normal with the variance that keeps a signal's size through the layer."""
    if len(shape) == 1:
        is_scale = name.endswith(("weight", "gamma"))
        return np.full(shape, 1.0 if is_scale else 0.0)
    fan_in = int(np.prod(shape[1:]))
    is_table = "embed" in name and ("token" in name or "position" in name) or "shared" in name
    return generator.standard_normal(shape) * (1.0 if is_table else fan_in**-0.5)


def _tame_posterior(vae) -> None:
    """Give the latents of a photo a variance near that of FLUX.1's, and a small posterior deviation."""
    import mindspore as ms

    channels = vae.config.latent_channels
    weight, bias = vae.encoder.conv_out.weight, vae.encoder.conv_out.bias
    gain = np.ones((2 * channels, 1, 1, 1), np.float32)
    gain[:channels], gain[channels:] = 3.0, 0.1
    weight.set_data(ms.Tensor(weight.asnumpy() * gain))
    bias.set_data(ms.Tensor(np.repeat([0.1159, -6.0], channels).astype(np.float32)))


def follow_umask(folder: Path) -> None:
    """Safetensors come out readable by their owner only; give files and folders the modes that the umask asks for."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for path in folder.rglob("*"):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
