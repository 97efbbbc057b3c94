"""What an experiment can say: all settings, by table, each with its default and the rules that a value must keep.

The text below a setting describes it to users: `described` puts it into the JSON Schema and into docs/experiment.md.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, with_config
from typing_extensions import TypedDict

from pipeline.settings.schema import DISTINCT, Flag, Number, Text, Whole, Word, between
from pipeline.settings.values import (
    BILLION,
    MOST,
    Dtype,
    FindingKind,
    LRScheduler,
    Mode,
    Names,
    NumberOfBlocks,
    Preset,
    Seed,
    Share,
    Size,
    UpToAMillion,
    UpToAThousand,
    WeightingScheme,
    flag_or_list,
    number_or_auto,
    plain_name,
)

OnlyKnown = with_config({"extra": "forbid"})


@OnlyKnown
class Dtypes(TypedDict, total=False):
    """What a component's parameters are held in, what it computes in, and what the store keeps of it."""

    params: Dtype
    """Of its parameters in memory."""
    compute: Dtype
    """Of its arithmetic."""
    storage: Dtype
    """Of what the store keeps of its output; that of `compute` unless given."""


@OnlyKnown
@dataclass(frozen=True)
class Paths:
    """Where results go. Relative paths here and in all other tables are relative to the experiment file."""

    store: Word | Names = "store"
    """Folder of what was encoded, to be shared by experiments and people. Of a list of folders the first is written to
    and the others are only read."""
    runs: Text = "runs"
    """Folder of the runs: each has its own folder there, `NAME-ID`."""


@OnlyKnown
@dataclass(frozen=True)
class Model:
    """The pretrained FLUX.1."""

    path: Text = ""
    """A Hub id, such as "black-forest-labs/FLUX.1-dev", or a local folder in diffusers' layout. Empty: the small model
    that comes with this package, which knows coloured shapes only."""
    revision: Text = ""
    """Branch, tag or commit on the Hub; empty: its default branch."""
    variant: Text = ""
    """Of the weight files, as in diffusers: "fp16" reads `*.fp16.safetensors`."""
    transformer: Text = ""
    """Take the transformer from here instead of from `path`, which has the other components: a single file as Black
    Forest Labs (`flux1-dev.safetensors`) or ComfyUI have it, or a transformer's folder in diffusers' layout. Its config
    must be that of `path`. Empty: that in `path`."""


@OnlyKnown
@dataclass(frozen=True)
class Data:
    """Photos and captions, and how they are prepared."""

    images: Text = ""
    """Folder of the photos. Empty: pictures of a new word, a blicket, are drawn to `blickets/` when they are first
    needed."""
    prompt: Text = ""
    """One caption for all photos, as in DreamBooth; the photos then need no captions of their own."""
    resolution: Size | Annotated[tuple[Size, ...], *DISTINCT] = 512
    """Width and height in pixels. With a list, each photo is trained on at each resolution."""
    buckets: Flag = False
    """Keep about the photo's own aspect ratio, at the area of resolution x resolution, instead of cropping to a
    square."""
    crops: Annotated[Whole, between(0, 1000)] = 0
    """Number of fixed random crops of each photo, of which one is drawn each time. 0: the centre."""
    flip: Flag = False
    """Encode the mirror image too; one of both is drawn each time."""
    repeats: Annotated[Whole, between(1, 100_000)] = 1
    """How often each photo counts in an epoch."""
    max_sequence_length: Annotated[Whole, between(1, 4096)] = 512
    """Length of a caption in T5 tokens. Longer captions are cut, shorter ones padded."""
    strict: Annotated[Flag | Annotated[tuple[FindingKind, ...], *DISTINCT], BeforeValidator(flag_or_list)] = False
    """What is an error of what `CheckData` finds ([Your photos and captions](data.md#what-checkdata-says)). `true`: all
    of it, captions that are cut, photos that are enlarged or occur twice, and the like. A list names kinds, such as
    `["cut-by-t5", "twice"]`; the others are only said."""


@OnlyKnown
@dataclass(frozen=True)
class PrecisionSettings:
    """Number formats, as a preset and by component. `params`, `compute` and `storage` of a component override the
    preset."""

    preset: Literal["auto", Preset] = "auto"
    """`auto` is bf16 where the device computes it, else fp32. A name with `-text-fp32` keeps both text encoders in
    fp32. Trained weights are fp32 in every preset."""
    simulate: Flag = False
    """On a device without bf16: round to bf16 and compute in fp32. Records and addresses in the store say so."""
    vae: Dtypes = field(default_factory=Dtypes)
    """Overrides for the VAE."""
    text_encoder: Dtypes = field(default_factory=Dtypes)
    """Overrides for CLIP."""
    text_encoder_2: Dtypes = field(default_factory=Dtypes)
    """Overrides for T5."""
    transformer: Dtypes = field(default_factory=Dtypes)
    """Overrides for the transformer."""
    trained: Dtypes = field(default_factory=Dtypes)
    """Overrides for the LoRA or the ControlNet."""


@OnlyKnown
@dataclass(frozen=True)
class Lora:
    """What `TrainLoRA` trains."""

    rank: Annotated[Whole, between(1, MOST)] = 4
    """Rank of the low-rank matrices."""
    alpha: UpToAMillion = 4.0
    """The LoRA is scaled by alpha / rank, in training and in the saved file. Set alpha when you change rank; the
    default does not adapt."""
    dropout: Share = 0.0
    """Share of the LoRA's inputs that are dropped in training."""
    targets: Literal["attention", "diffusers", "all-linear"] | Names = "attention"
    """Which linear layers get a LoRA. `attention` is to_q, to_k, to_v and to_out.0, `diffusers` what diffusers' FLUX
    script trains by default, `all-linear` all linear layers of the blocks. A list names endings of module names, with
    `*` for anything: `["to_q", "single_transformer_blocks.*.proj_out"]`."""
    train_text_encoder: Flag = False
    """Train a LoRA on CLIP too, with `text_encoder_lr`. T5 always stays as it is."""
    init_from: Text = ""
    """A LoRA file to begin from, in diffusers', kohya's or ComfyUI's layout, at most of this rank and of layers that
    `targets` names. Layers that it does not have begin as without it."""


@OnlyKnown
@dataclass(frozen=True)
class ControlNet:
    """What `TrainControlNet` trains. A file with this table is taken for a ControlNet's by `plan` and by `python -m
    cache`."""

    init_from: Text = ""
    """Folder of a ControlNet to start from. Empty: copies of the transformer's first blocks, as many as the next two
    settings say."""
    num_double_layers: Annotated[NumberOfBlocks | Literal["auto"], number_or_auto(0, 1000)] = "auto"
    """Number of double-stream blocks. `auto` is 4, or as many as the transformer has where it has fewer."""
    num_single_layers: NumberOfBlocks = 0
    """Number of single-stream blocks."""
    condition: Literal["file", "canny", "grey", "blur", "tile"] = "file"
    """`file` reads `conditioning_image` from metadata.jsonl. The others compute the condition from the photo: edges
    (`canny`), `grey`, `blur` or `tile`."""
    conditioning_scale: UpToAThousand = 1.0
    """Factor on what the ControlNet adds to the transformer."""
    save_dtype: Dtype = "fp32"
    """Of the saved weights. They train in fp32 whatever this says."""


@OnlyKnown
@dataclass(frozen=True)
class Train:
    """How it trains; the same for a LoRA and a ControlNet."""

    steps: Annotated[Whole, between(1, BILLION)] = 500
    """Number of updates."""
    epochs: Annotated[Whole, between(0, 1_000_000)] = 0
    """Where it is above 0: passes over the photos, instead of `steps`."""
    batch_size: Annotated[Whole, between(1, MOST)] = 1
    """What one device computes at a time."""
    accumulate: Annotated[Whole, between(1, MOST)] = 1
    """Batches in an update. An update has batch_size x accumulate samples, on any number of devices."""
    learning_rate: UpToAThousand = 1e-4
    """Of the LoRA or the ControlNet."""
    text_encoder_lr: UpToAThousand = 5e-6
    """Learning rate of CLIP's LoRA."""
    lr_scheduler: LRScheduler = "constant"
    """How the learning rate changes over the steps; the names and curves are those of diffusers."""
    lr_warmup_steps: Annotated[Whole, between(0, BILLION)] = 0
    """Updates over which the learning rate rises from 0; not with `constant`."""
    lr_num_cycles: Annotated[Number, Field(ge=0, le=1_000_000)] = 0.0
    """Of `cosine` and `cosine_with_restarts`. 0 is diffusers' default of each: once down, one start."""
    lr_power: UpToAThousand = 1.0
    """Of `polynomial`."""
    optimizer: Literal["adamw", "adam_weight_decay"] = "adamw"
    """`adamw` is PyTorch's AdamW. `adam_weight_decay` is MindSpore's, without bias correction."""
    adam_beta1: Share = 0.9
    """Decay of the first moment."""
    adam_beta2: Share = 0.999
    """Decay of the second moment."""
    adam_epsilon: Annotated[Number, Field(ge=1e-30, le=1)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: Annotated[Number, Field(ge=0, le=1000)] = 1e-4
    """Decoupled weight decay."""
    max_grad_norm: Annotated[Number, Field(ge=0, le=1e30)] = 1.0
    """Gradients are clipped to this norm. 0: no clipping."""
    ema_decay: Share = 0.0
    """Above 0, the result is the exponential moving average of the weights."""
    weighting_scheme: WeightingScheme = "none"
    """`logit_normal` and `mode` draw some noise levels more often; `sigma_sqrt` and `cosmap` weigh the loss by level.
    `none` draws uniformly."""
    logit_mean: Annotated[Number, Field(ge=-1000, le=1000)] = 0.0
    """Of `logit_normal`. Above 0 prefers little noise, below 0 much noise."""
    logit_std: UpToAThousand = 1.0
    """Of `logit_normal`."""
    mode_scale: Annotated[Number, Field(ge=-1, lt=1.75)] = 1.29
    """Of `mode`."""
    caption_dropout: Share = 0.0
    """Share of the samples that get the empty caption instead of the photo's own."""
    guidance_scale: Annotated[Number, Field(ge=0, le=1_000_000)] = 3.5
    """Guidance in training, for models with a guidance embedding, such as FLUX.1-dev."""
    posterior: Literal["sample", "mode"] = "sample"
    """`sample` draws latents anew from the VAE's posterior each time; `mode` takes its mean."""
    gradient_checkpointing: Flag = False
    """Recompute activations: less memory, more time. On CPU in PyNative only."""
    mode: Mode = "auto"
    """`jit` compiles the step, `pynative` does not. `auto` compiles on CPU where there are enough steps to repay it,
    and not on an NPU."""
    log_every: Annotated[Whole, between(1, BILLION)] = 1
    """Steps between two lines of metrics.jsonl."""
    checkpoint_every: Annotated[Whole, between(0, BILLION)] = 500
    """Steps between two checkpoints. 0: only at the end, and when the training is stopped."""
    keep_checkpoints: Annotated[Whole, between(1, 1_000_000)] = 2
    """How many of the newest checkpoints are kept."""
    tracker: Literal["none", "wandb", "swanlab"] = "none"
    """Also send the numbers of metrics.jsonl and the settings to Weights & Biases or SwanLab
    ([trackers](several-experiments.md#trackers))."""


@OnlyKnown
@dataclass(frozen=True)
class Prior:
    """Prior preservation: pictures that the base model draws itself, trained on beside yours, so that it keeps what it
    knows (section 3.2 of [DreamBooth](https://arxiv.org/abs/2208.12242)). They are drawn once for all experiments that
    ask for the same ones. Off where there are no prompts."""

    prompts: tuple[Text, ...] = ()
    """What is to be remembered, such as `["a photo of a cat"]`. Each update then takes as many batches of these
    pictures as of yours, and twice as long."""
    num_images: Annotated[Whole, between(1, 1_000_000)] = 100
    """Number of pictures, the prompts taken in turn."""
    weight: UpToAThousand = 1.0
    """Of their mean loss, which is added to that of your photos."""
    seed: Seed = 0
    """Picture i is drawn from the noise of seed + i."""
    num_inference_steps: Annotated[Whole, between(1, 10_000)] = 28
    """Sampling steps."""
    guidance_scale: Annotated[Number, Field(ge=0, le=1_000_000)] = 3.5
    """For models with a guidance embedding. FLUX.1-schnell has none and does not use it."""
    batch_size: Annotated[Whole, between(1, MOST)] = 1
    """Pictures that are drawn at a time."""


@OnlyKnown
@dataclass(frozen=True)
class Sampling:
    """What is drawn with the result, to be looked at. Changing this table never retrains: only what is new is encoded
    and drawn."""

    prompts: tuple[Text, ...] = ()
    """A picture is drawn for each."""
    seed: Seed = 0
    """Picture i is drawn from the noise of seed + i."""
    num_inference_steps: Annotated[Whole, between(1, 10_000)] = 28
    """Denoising steps of a picture."""
    guidance_scale: Annotated[Number, Field(ge=0, le=1_000_000)] = 3.5
    """For models with a guidance embedding; FLUX.1-schnell has none and does not use it."""
    batch_size: Annotated[Whole, between(1, MOST)] = 1
    """Pictures drawn at a time. It changes a picture by rounding only."""
    resolution: Annotated[Whole, between(0, 8192, multiple_of=16)] = 0
    """Width and height in pixels, a multiple of 16. 0: the highest of `[data] resolution`."""
    conditions: tuple[Text, ...] = ()
    """For a ControlNet: an image file for each prompt, in the same order."""
    base: Flag = True
    """Draw each prompt also without what was trained, from the same noise."""
    mode: Mode = "auto"
    """`jit` compiles the prediction, once for all steps and pictures of one size, those of `[prior]` too; `pynative`
    does not. `auto` chooses by the number of predictions. It changes a picture by rounding only."""
    every: Annotated[Whole, between(0, BILLION)] = 0
    """Draw the prompts also while it trains, after every so many steps, and keep the weights of these steps ([Pictures
    while it trains](pictures.md#while-it-trains)). 0: only once it is trained."""


@OnlyKnown
@dataclass(frozen=True)
class Device:
    """What computes. `jit_level`, `exec_order`, `memory_pool_gb` and `cpu_affinity` are MindSpore's own and for an NPU
    only: [Ascend](ascend.md#settings-for-an-npu)."""

    target: Literal["auto", "Ascend", "CPU"] = "auto"
    """`auto` is an NPU where there is one, else the CPU."""
    memory_gb: UpToAMillion = 64.0
    """Memory of an NPU, for `python -m pipeline plan`; a CPU's is the machine's."""
    deterministic: Flag = True
    """Ask an NPU for the same bits each time. `false` may be faster; the run is another one then."""
    jit_level: Literal["O0", "O1"] = "O0"
    """Level of compiled steps; `O1` fuses operators."""
    exec_order: Literal["bfs", "dfs"] = "bfs"
    """Order of operators in compiled steps."""
    memory_pool_gb: Annotated[Number, Field(ge=0, le=1_000_000)] = 0.0
    """The most memory that MindSpore takes on the NPU. 0: all of it."""
    cpu_affinity: Flag = False
    """Bind MindSpore's threads to cores near the NPU."""
    keep_compiled: Literal["auto", "always", "never"] = "auto"
    """Keep compiled steps in your own cache folder, so that the next run of the same sizes starts with them. `auto`: on
    CPU, as nobody has tried it on an NPU."""


@OnlyKnown
@dataclass(frozen=True)
class Parallel:
    """Several devices: [workers that encode](several-workers.md), and [ranks that train](ranks.md)."""

    ranks: Annotated[Annotated[Whole, between(1, MOST)] | Literal["auto"], number_or_auto(1, MOST)] = 1
    """Number of devices that share the batches of a step. `auto`: all NPUs, or one CPU."""
    reduce: Literal["ordered", "fast"] = "ordered"
    """`ordered` adds gradients in the order of the batches, so that the bits are those of one device. `fast` leaves the
    order to the communication library: it moves less, and the bits differ for each number of ranks."""
    shard_optimizer: Flag = False
    """Each rank keeps its share of moments and averages (ZeRO stage 1): less memory, more exchange, the same bits."""
    encoders: Annotated[Whole, between(1, MOST)] = 1
    """Number of shards that encoding and drawing are divided into, for as many workers."""


@OnlyKnown
@dataclass(frozen=True)
class Settings:
    """Everything that an experiment file can say."""

    name: Annotated[Text, AfterValidator(plain_name)] = "experiment"
    """The run's folder is `NAME-ID`."""
    seed: Seed = 0
    """Of the LoRA's first weights, the order of the photos, noise, crops, flips and dropout."""
    paths: Paths = Paths()
    model: Model = Model()
    data: Data = Data()
    precision: PrecisionSettings = PrecisionSettings()
    lora: Lora = Lora()
    controlnet: ControlNet = ControlNet()
    train: Train = Train()
    prior: Prior = Prior()
    sample: Sampling = Sampling()
    device: Device = Device()
    parallel: Parallel = Parallel()
