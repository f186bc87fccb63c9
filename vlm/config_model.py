"""The section of a recipe that says what the model is made of: family, parts, what is frozen.

Not here: the other sections (``vlm.config`` joins all), what the parts compute (``vlm.models``).
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, model_validator

from vlm.config_train import Strict

Component = Literal["vision", "connector", "language"]
COMPONENTS: tuple[Component, ...] = ("vision", "connector", "language")


class PartConfig(Strict):
    """A vision encoder or language model: weights to load, or a config to start at random."""

    #: Hugging Face id or local folder
    pretrained: str | None = None
    #: keys of the transformers config, ``model_type`` among them; random weights
    config: dict[str, Any] | None = None
    #: recompute activations in the backward pass
    gradient_checkpointing: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> "PartConfig":
        if (self.pretrained is None) == (self.config is None):
            raise ValueError("set exactly one of `pretrained` and `config`")
        if self.config is not None and "model_type" not in self.config:
            raise ValueError("`config` needs `model_type`, for example dinov2 or llama")
        return self


class VisionConfig(PartConfig):
    #: of a tower that trains, only its last so many layers do; None: all of it
    train_last: int | None = Field(None, gt=0)
    #: std of the position embeddings of a tower that starts at random; None: as its config says.
    #: At transformers' 0.02 a small tower never learns where things are.
    position_std: float | None = Field(None, gt=0)


class LoraConfig(Strict):
    """Adapters: of a component that has them, nothing else trains."""

    rank: int = Field(16, gt=0)
    #: what adapters add is scaled by alpha / rank
    alpha: float = Field(16.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    #: names of the modules that get one; None: the attention's, by model type
    targets: tuple[str, ...] | None = None


class LanguageConfig(PartConfig):
    lora: LoraConfig | None = None
    #: weights of its linear maps in 4 bits; they cannot train, adapters can
    quantize: Literal["nf4"] | None = None

    @model_validator(mode="after")
    def _has_a_base(self) -> "LanguageConfig":
        for name, wanted in (("lora", self.lora), ("quantize", self.quantize)):
            if wanted is not None and self.pretrained is None:
                raise ValueError(
                    f"`{name}` needs `pretrained`: adapters and 4-bit weights stand on a model "
                    "that can be loaded again, and exports name it"
                )
        return self


class FoveationConfig(Strict):
    """How the language model's queries look at frames (family `foveated`)."""

    #: width of the query that travels from the language model to the encoder
    query_dim: int = Field(384, gt=0)
    #: a bias here dominates the query and makes attention uniform
    query_bias: bool = False
    #: std of q_static and q_init; 0.02 gives uniform attention
    query_std: float = Field(1.0, gt=0)
    #: multiplies visual tokens; about the std of the language model's embeddings
    visual_scale: float = Field(0.14, gt=0)
    #: a query meets the tower's last layer only, not all of them (ablation)
    shallow: bool = False
    #: a query attends to itself beside the frame's tokens
    sees_itself: bool = False
    #: fine passes; each but the first asks from the hidden states of the one before
    fine_passes: int = Field(1, gt=0, le=16)
    #: which fine passes are trained on: the last, all alike, or later ones more (i / sum of i)
    fine_loss: Literal["final", "mean", "progressive"] = "final"
    #: weight of the coarse pass' cross entropy beside the fine one's
    coarse_weight: float = Field(0.0, ge=0)
    #: look again in the backward pass instead of keeping what was seen
    gradient_checkpointing: bool = False

    @property
    def tokens_per_frame(self) -> int:
        """Placeholders of a frame in the language model."""
        return 1


class LatentConfig(FoveationConfig):
    """Foveation that also predicts the next frame's latent (family `foveated_latent`)."""

    #: weight of the coarse pass' square error beside the fine one's
    coarse_weight: float = Field(1.0, ge=0)
    head: Literal["film", "mlp", "cross_attention"] = "film"
    #: weight of the square error beside the caption's cross entropy, in the joint mode
    reconstruction_weight: float = Field(0.5, ge=0)
    #: of the latents: channels, and numbers on a side
    latent_channels: int = Field(4, gt=0)
    latent_size: int = Field(32, gt=0)
    #: folder or id of the AutoencoderKL that makes latents of samples that bring none
    autoencoder: str | None = None

    @property
    def stored_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w) of the latents that samples must bring; None where they need not."""
        stored = self.autoencoder is None
        return (self.latent_channels, self.latent_size, self.latent_size) if stored else None


class PoolingConfig(Strict):
    """A fixed grid of tokens for every frame (family `multi_token`)."""

    #: the square of the grid's side
    tokens_per_frame: Literal[1, 4, 9, 16, 25, 36, 49, 64] = 16
    #: `pool` averages patches and projects them; `pixel_shuffle` lays them side by side for an MLP
    reduction: Literal["pool", "pixel_shuffle"] = "pool"
    #: patches on a side of one token of `pixel_shuffle`
    shuffle: int = Field(4, gt=0, le=16)
    #: multiplies visual tokens; about the std of the language model's embeddings
    visual_scale: float = Field(0.14, gt=0)


class BlindConfig(Strict):
    """No place for frames in the text (family `blind`)."""

    @property
    def tokens_per_frame(self) -> int:
        return 0


class PerceiverConfig(Strict):
    """Latents that read each image, or the linear projector (family `perceiver`)."""

    kind: Literal["resampler", "linear"] = "resampler"
    #: which of the tower's tokens are read
    reads: Literal["all", "cls", "patches"] = "all"
    #: latents of the resampler, or tokens of the projector
    tokens_per_frame: int = Field(64, gt=0)
    #: blocks of the resampler; maps of the projector, 1 or 2
    num_layers: int = Field(6, gt=0)
    #: of the resampler
    num_heads: int = Field(16, gt=0)
    mlp_ratio: int = Field(4, gt=0)
    #: how the projector comes to fewer tokens than the tower has
    pool: Literal["none", "avg", "learned"] = "none"

    @model_validator(mode="after")
    def _of_kind(self) -> "PerceiverConfig":
        if self.kind == "linear" and self.num_layers > 2:
            raise ValueError(f"num_layers is {self.num_layers}; the linear projector has 1 or 2")
        if self.kind == "resampler" and self.pool != "none":
            raise ValueError(f"pool {self.pool} is the linear projector's; set `kind: linear`")
        return self


class PrefixConfig(Strict):
    """A projection of each of the tower's tokens (family `prefix`)."""

    kind: Literal["linear", "mlp"] = "linear"
    #: which of the tower's tokens are read
    reads: Literal["all", "cls", "patches"] = "all"
    #: all that are read: 196 of a 224 px image in patches of 16
    tokens_per_frame: int = Field(196, gt=0)
    #: of the mlp
    hidden_dim: int = Field(2048, gt=0)
    dropout: float = Field(0.1, ge=0, lt=1)


class CrossAttentionConfig(Strict):
    """No place in the text: every layer looks at all of the tower's tokens (`cross_attention`)."""

    #: which of the tower's tokens are looked at
    reads: Literal["all", "cls", "patches"] = "all"

    @property
    def tokens_per_frame(self) -> int:
        return 0


Family = Literal[
    "foveated",
    "foveated_latent",
    "multi_token",
    "blind",
    "perceiver",
    "prefix",
    "cross_attention",
]
ConnectorConfig = (
    LatentConfig
    | FoveationConfig
    | PoolingConfig
    | BlindConfig
    | PerceiverConfig
    | PrefixConfig
    | CrossAttentionConfig
)
CONNECTORS: dict[str, type[ConnectorConfig]] = {
    "foveated": FoveationConfig,
    "foveated_latent": LatentConfig,
    "multi_token": PoolingConfig,
    "blind": BlindConfig,
    "perceiver": PerceiverConfig,
    "prefix": PrefixConfig,
    "cross_attention": CrossAttentionConfig,
}


def _of_family(found: Any, info: ValidationInfo) -> Any:
    """The connector's keys are those of the family."""
    kind = CONNECTORS.get(info.data.get("family", ""))
    if kind is None:
        return BlindConfig()  # an unknown family is an error of its own, and there is no other
    return found if isinstance(found, kind) else kind.model_validate(found)


def _frozen_for_good(found: Any) -> Any:
    """A list of components freezes them for the whole run."""
    return dict.fromkeys(found) if isinstance(found, list | tuple) else found


class ModelConfig(Strict):
    family: Family
    #: run or checkpoint folder whose weights this run starts from; of a run, its best checkpoint
    init_from: Path | None = None
    vision: VisionConfig
    language: LanguageConfig
    connector: Annotated[ConnectorConfig, BeforeValidator(_of_family)] = Field(
        default_factory=dict, validate_default=True
    )
    #: folder or id of the tokenizer; it must hold a chat template and `image_token`
    tokenizer: str
    image_token: str = "<|image|>"
    #: components that do not train: a list, or component -> global step from which on it does
    freeze: Annotated[
        dict[Component, Annotated[int, Field(gt=0)] | None], BeforeValidator(_frozen_for_good)
    ] = {}

    @property
    def latent_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w) of the latents that samples must bring; None where they need not."""
        return self.connector.stored_shape if isinstance(self.connector, LatentConfig) else None

    @model_validator(mode="after")
    def _has_what_trains(self) -> "ModelConfig":
        missing = sorted({"vision", "connector"} - {k for k, v in self.freeze.items() if v is None})
        if self.family == "blind" and missing:
            raise ValueError(
                f"family blind has no vision and no connector; name {' and '.join(missing)} in "
                "`freeze`"
            )
        return self
