"""The configuration of a run: YAML plus dotted overrides, every key known and typed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from annotations.errors import UserError


def _ordered(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("give the lower end first")
    return pair


def _distinct(names: list[str]) -> list[str]:
    if len(set(names)) < len(names):
        raise ValueError("give each name once")
    return names


Share = Annotated[float, Field(ge=0, le=1)]  # of something, or a probability
PositiveShare = Annotated[float, Field(gt=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Auto = Annotated[Literal["auto"], Tag("auto")]  # derived from the length of the run
ByWord = Discriminator(
    lambda value: "auto" if isinstance(value, str | bool) else "given"
)  # so that an error is of one type only
Ordered = AfterValidator(_ordered)  # of the ends of a range; the two ends of a schedule may fall


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, protected_namespaces=(), allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation in (int, float):
            raise ValueError("give a number")  # pydantic would take true for 1
        return value


class DataConfig(_Section):
    """Which tiles and boxes are trained on."""

    tiles: str = Field("", description="folder of slide files written by `odis-path tile` or `import`")
    kinds: Annotated[list[Literal["tissue", "cell", "proposal"]], AfterValidator(_distinct)] = Field(
        ["tissue", "cell", "proposal"], min_length=1
    )
    holdout: float = Field(0.2, ge=0, lt=1, description="share of patients kept out of pretraining, for the k-NN")
    holdout_patients: list[str] = Field([], description="patient ids kept out; replaces `holdout`")
    boxless: Literal["keep", "drop"] = Field("keep", description="tiles without a box: trained whole, or left out")
    workers: int = Field(2, ge=0)
    mean: tuple[Share, Share, Share] = Field((0.485, 0.456, 0.406), description="of pixel values from 0 to 1, as std")
    std: tuple[PositiveShare, PositiveShare, PositiveShare] = (0.229, 0.224, 0.225)


class TargetConfig(_Section):
    """The target object of a tile and what the [OBJ] token may see of it."""

    crop: bool = Field(True, description="object-aware crops: every view shows the target")
    mask: bool = Field(True, description="masked attention: [OBJ] pools only from in-box patches")
    order: Literal["box_first", "crop_first"] = Field("box_first", description="crop_first: a box that both free crops show")
    choice: Literal["uniform", "area", "label"] = "uniform"
    objects: int = Field(
        1,
        ge=1,
        description="objects a tile, each with an [OBJ] of its own (with views.window_um: in a window of its own)",
    )
    geometry: Literal["box", "polygon"] = Field("box", description="polygon: needs `annotate --polygons`")
    whole_tile_p: Share = Field(0.0, description="share of samples whose target is the whole tile")
    whole_share: PositiveShare = Field(
        0.8, description="a box of more than this share of the tile counts as the whole tile, with free crops; 1: none does"
    )
    min_patches: float = Field(4.0, ge=1, description="a target spans at least this many patches of a mean global crop")
    containment: Literal["full", "fraction", "any"] = "full"
    fraction: PositiveShare = 0.5
    sampler: Literal["construct", "reject"] = "construct"
    tries: int = Field(20, ge=1)
    fallback: Literal["construct", "zero", "full"] = Field(
        "construct", description="after the last try: a crop made to contain the box, no weight for the view, or a full mask"
    )
    mask_rule: Literal["any", "fraction", "centre"] = "any"
    mask_fraction: PositiveShare = 0.5
    mask_margin: int = Field(0, ge=0, le=1000, description="patches added around the box")
    local: Literal["object", "free"] = "object"
    noise_jitter: float = Field(0.0, ge=0, le=0.5, description="edges of the boxes move by up to this share of the side")
    noise_drop: Share = Field(0.0, description="probability that a box is missing")
    noise_false: Share = Field(0.0, description="probability of a false box for each: its size, a random place")


class ViewConfig(_Section):
    """Crops and their colours."""

    window_um: NotNegative = Field(
        0.0,
        description="side, in micrometres, of the square window that views are cut from, centred on the target object and "
        "completed over the border of its tile; 0: they are cut from the tile",
    )
    global_size: int = Field(224, ge=16)
    global_scale: Annotated[tuple[PositiveShare, PositiveShare], Ordered] = (0.25, 1.0)
    local_count: int = Field(10, ge=0)
    local_size: int = Field(96, ge=16)
    local_scale: Annotated[tuple[PositiveShare, PositiveShare], Ordered] = (0.05, 0.25)
    ratio: Annotated[tuple[Positive, Positive], Ordered] = (3 / 4, 4 / 3)
    turns: Literal["none", "flip", "dihedral"] = "flip"
    brightness: Share = Field(0.4, description="times 1 +- this, which must not fall below 0; as contrast and saturation")
    contrast: Share = 0.4
    saturation: Share = 0.2
    hue: float = Field(0.1, ge=0, le=0.5, description="in turns; 0.5 is any hue")
    hue_space: Literal["hsv", "yiq"] = Field(
        "yiq", description="hsv: as torchvision, DINO and iBOT turn it; yiq: around the grey axis, 1.4 times as much on H&E"
    )
    jitter_p: Share = 0.8
    gray_p: Share = 0.2
    blur_p: tuple[Share, Share, Share] = Field((1.0, 0.1, 0.5), description="first global, second global, locals")
    blur_sigma: Annotated[tuple[NotNegative, NotNegative], Ordered] = (0.1, 2.0)
    solarise_p: Share = Field(0.2, description="on the second global")
    stain_p: Share = 0.0
    stain_scale: float = Field(0.0, ge=0, lt=1, description="each stain's amount times 1 +- this")
    stain_shift: Share = Field(0.0, description="each stain's amount +- this, in optical density")
    stain_swap_p: Share = Field(0.0, description="share of the views that take the stain of another slide of the cohort")

    @model_validator(mode="after")
    def _some_crop_fits(self) -> ViewConfig:
        most = min(1.0, self.ratio[1], 1 / self.ratio[0])  # of the tile, by the squarest crop
        for key in ("global_scale", "local_scale"):
            if getattr(self, key)[0] > most:
                raise ValueError(
                    f"views.{key} begins at {getattr(self, key)[0]}, but no crop of views.ratio={list(self.ratio)} covers more "
                    f"than {most:.2f} of a tile"
                )
        return self


class MimConfig(_Section):
    """Which patches of the student's global views are hidden (iBOT)."""

    probability: Share = 0.5
    ratio: Annotated[tuple[Share, Share], Ordered] = (0.1, 0.5)
    blocks: Literal["ibot", "filled"] = Field(
        "filled", description="ibot: large blocks only, at most the ratio; filled: from 4 patches on, the rest patch by patch"
    )


class ModelConfig(_Section):
    """A timm vision transformer with an [OBJ] token."""

    name: str = "vit_small_patch16_224"
    kwargs: dict[str, Any] = Field({}, description="further arguments of timm.create_model, for example depth")
    weights: str | None = Field(None, description="'timm' for the published weights, or a local file")
    drop_path: float = Field(0.1, ge=0, lt=1)
    pool: Literal["auto", "obj", "linear"] = Field(
        "auto",
        description="linear: mean of in-box patch embeddings (a documented failure); auto: obj, but linear for weights that "
        "were trained by averaging patches",
    )
    read_only: bool = Field(False, description="patches do not see [OBJ]: any number of objects in one pass")
    checkpoint_blocks: bool = Field(False, description="activation checkpointing: less memory, more time")
    compile_blocks: Literal[True, False, "auto"] = Field(
        "auto", description="torch.compile of blocks, views and patch loss; auto: on a GPU, where it pays"
    )


class HeadConfig(_Section):
    """The projection head of DINO and iBOT."""

    out_dim: int = Field(8192, ge=2)
    hidden_dim: int = Field(2048, ge=1)
    bottleneck_dim: int = Field(256, ge=1)
    layers: int = Field(3, ge=1)
    norm_last_layer: bool = Field(True, description="the gain of the prototypes stays 1; false: it is trained")
    prototype_init: Literal["uniform", "normal"] = Field(
        "normal", description="uniform: torch's Linear, rows of length 0.58 (DINO, iBOT); normal: of 0.02, rows of 0.32"
    )
    shared: bool = Field(True, description="[OBJ] and patches share the head")


class LossConfig(_Section):
    """Weights, temperatures and centering."""

    obj_weight: NotNegative = 1.0
    patch_weight: NotNegative = 1.0
    patch_in_box_only: bool = False
    image_weight: NotNegative = Field(0.0, description="of the same loss on one more token that sees the whole image")
    student_temperature: Positive = 0.1
    teacher_temperature: tuple[Positive, Positive] = (0.04, 0.07)
    teacher_temperature_epochs: NotNegative = 30
    centering: Literal["center", "sinkhorn"] = Field("center", description="sinkhorn: over one micro-batch of all ranks")
    center_momentum: Share = 0.9
    tile_center: Share = Field(
        0.0,
        description="share of the mean teacher logits of a tile's objects that is taken from each (target.objects > 1)",
    )
    patch_center: Literal["all", "hidden"] = Field(
        "hidden", description="the center of patches is the mean of all patches of the globals (iBOT), or of hidden ones"
    )
    sinkhorn_iterations: int = Field(3, ge=1)
    koleo_weight: NotNegative = Field(0.0, description="spreads the student's [OBJ] embeddings (DINOv2: 0.1)")
    kde_weight: NotNegative = Field(0.0, description="the same by a kernel density (Virchow2: 0.05)")
    kde_concentration: Positive = 5.0


class OptimConfig(_Section):
    """AdamW and its schedules; one optimisation step is a batch over all ranks."""

    batch_size: int = Field(1024, ge=1, description="tiles a step, over all ranks")
    accumulate: int = Field(1, ge=1, description="micro-batches a step on each rank")
    epochs: Positive = Field(100, le=1e6)
    lr: Positive = Field(5e-4, description="at batch 256; scaled by batch / 256")
    min_lr: NotNegative = 1e-6
    warmup_epochs: Annotated[Annotated[NotNegative, Tag("given")] | Auto, ByWord] = Field(
        "auto", description="of the learning rate; auto: a tenth of the run, but at most 10 epochs"
    )
    weight_decay: tuple[NotNegative, NotNegative] = (0.04, 0.4)
    decay_gain: bool = Field(False, description="weight decay on the gain that head.norm_last_layer=false trains (DINO, iBOT)")
    clip: NotNegative = Field(3.0, description="0: off")
    clip_mode: Literal["per_parameter", "global"] = "per_parameter"
    freeze_last_layer_epochs: NotNegative = 1
    freeze_backbone_epochs: NotNegative = Field(0, description="until the heads are warm, when going on from other weights")
    layer_decay: PositiveShare = Field(1.0, description="learning rate of each block relative to the next")
    ema: Annotated[Annotated[tuple[Share, Share], Tag("given")] | Auto, ByWord] = Field(
        "auto",
        description="momentum of the teacher, at first and at the end; auto: 0.996 to 1, and in runs of less than 1,497 steps "
        "from so much less that at most 5 % of the start weights stay in it",
    )
    amp: Literal["auto", "bf16", "fp32"] = Field("auto", description="auto: bf16 on a GPU, fp32 on a CPU")


class EvalConfig(_Section):
    """k-NN of the teacher on the held-out patients while training."""

    every_epochs: NotNegative = Field(1, description="0: never")
    k: int = Field(20, ge=1)
    max_tiles: int = Field(4000, ge=2, description="compared with, and half as many judged")


class RunConfig(_Section):
    """Output folder, checkpoints, log and device of a run."""

    out: str = Field("runs/odis", min_length=1)
    seed: int = Field(0, ge=0, le=2**63 - 1)
    save_every_epochs: Positive = 1
    keep: int = Field(2, ge=1, description="checkpoints kept")
    log_every_steps: int = Field(10, ge=1)
    device: str = Field("auto", description="auto, cpu or cuda")
    tensorboard: bool = Field(False, description="event files in the run folder; needs the extra `tracking`")
    wandb: bool = Field(False, description="Weights & Biases; WANDB_MODE holds; needs the extra `tracking`")
    wandb_project: str = Field("odis-path", min_length=1)


class PretrainConfig(_Section):
    """Everything a run is made of."""

    name: str = "odis"
    data: DataConfig = DataConfig()
    target: TargetConfig = TargetConfig()
    views: ViewConfig = ViewConfig()
    mim: MimConfig = MimConfig()
    model: ModelConfig = ModelConfig()
    head: HeadConfig = HeadConfig()
    loss: LossConfig = LossConfig()
    optim: OptimConfig = OptimConfig()
    eval: EvalConfig = EvalConfig()
    run: RunConfig = RunConfig()

    @model_validator(mode="after")
    def _check(self) -> PretrainConfig:
        if self.loss.obj_weight == 0 and 0 in (self.loss.patch_weight, self.mim.probability, self.mim.ratio[1]):
            raise ValueError(
                "loss.obj_weight is 0, and so is loss.patch_weight, mim.probability or the end of mim.ratio: nothing to train"
            )
        if self.target.geometry == "polygon" and (self.target.noise_jitter or self.target.noise_false):
            raise ValueError("target.noise_jitter and target.noise_false change boxes, not outlines: set target.geometry=box")
        if not self.target.mask and ((self.target.objects > 1 and not self.views.window_um) or self.loss.image_weight):
            raise ValueError("target.objects > 1 (without views.window_um) and loss.image_weight need target.mask=true")
        if self.views.window_um and self.target.order == "crop_first":
            raise ValueError("views.window_um centres a window on a chosen object: set target.order=box_first")
        if self.loss.tile_center and self.target.objects == 1:
            raise ValueError("loss.tile_center compares the objects of a tile: set target.objects to 2 or more")
        if not self.target.mask and self.loss.patch_in_box_only:
            raise ValueError("loss.patch_in_box_only=true needs target.mask=true: without masks no patch is in or out of a box")
        return self


def windows_a_tile(config: PretrainConfig) -> int:
    """The number of windows that a tile is seen through, each with one object; 1 where views are cut from the tile itself."""
    return config.target.objects if config.views.window_um else 1


def find_config(name: str) -> Path:
    """Find the YAML file `name`: a path, or the name of a recipe that comes with odis-path (with or without .yaml)."""
    path = Path(name)
    if path.is_file():
        return path
    for folder in config_folders():
        candidate = folder / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
        if candidate.is_file() and len(path.parts) <= 2:
            return candidate
    known = sorted({p.stem for folder in config_folders() for p in folder.glob("*.yaml")})
    raise UserError(f"{name}: no such config; give a YAML file or one of: {', '.join(known)}")


def config_folders() -> list[Path]:
    """Find the folder of the recipes: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return [folder for folder in (package / "configs", package.parent / "configs") if folder.is_dir()]


def load_config(source: str | Path, overrides: list[str] | None = None) -> PretrainConfig:
    """Read a YAML config and apply `key.sub=value` overrides.

    Raises UserError in one line that names the file, the key, the value and what would be right.
    """
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = find_config(str(source))
    overrides = overrides or []
    for item in overrides:
        if not re.match(r"^[A-Za-z_][\w.]*=", item):
            raise UserError(f"{item}: not an override; write key.sub=value, for example optim.epochs=20")
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            what = "a list" if isinstance(loaded, ListConfig) else f"{type(loaded).__name__}"
            raise UserError(f"{path}: holds {what}, not a mapping of sections such as data: and optim:")
        merged = OmegaConf.merge(loaded, OmegaConf.from_dotlist(overrides))
        values = OmegaConf.to_container(merged, resolve=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds {type(values).__name__}, not a mapping of sections such as data: and optim:")
    return parse_config({str(key): value for key, value in values.items()}, str(path))


def parse_config(values: dict[str, Any], where: str) -> PretrainConfig:
    """Check a plain dict against the schema; `where` names its origin in the error."""
    try:
        return PretrainConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {'; '.join(_explain(item) for item in error.errors()[:3])}") from None


def _explain(item: Any) -> str:
    parts = [part for part in item["loc"] if part not in ("given", "auto")]  # tags of a union, no keys
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts).removeprefix(".")
    if item["type"] == "extra_forbidden":
        near = _nearest(key)
        return f"unknown key {key}" + (f"; did you mean {near}?" if near else f"; known: {', '.join(_siblings(key))}")
    return f"{key + ' is ' + repr(item['input']) + ': ' if key else ''}{item['msg'].removeprefix('Value error, ')}"


def _siblings(key: str) -> list[str]:
    fields: Any = PretrainConfig.model_fields
    for part in key.split(".")[:-1]:
        fields = fields[part].annotation.model_fields if part in fields else {}
    return list(fields)


def _nearest(key: str) -> str | None:
    from difflib import get_close_matches

    known = [f"{s}.{k}" for s, f in PretrainConfig.model_fields.items() for k in _keys(f.annotation)]
    known += list(PretrainConfig.model_fields)
    close = get_close_matches(key, known, n=1, cutoff=0.6)
    return close[0] if close else None


def _keys(annotation: Any) -> list[str]:
    return list(annotation.model_fields) if isinstance(annotation, type) and issubclass(annotation, BaseModel) else []
