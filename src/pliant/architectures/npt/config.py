"""Which of the six NPT forms a layer takes, and with what options."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from pliant.architectures.base import from_fields, nearest
from pliant.errors import ConfigError

FORMS = ("v1", "v1_single", "v2", "outer", "keyed", "keyed_pre")
CLOSED_FORMS = ("keyed", "keyed_pre")
GATE_MODULATIONS = ("additive", "multiplicative", "both")
TARGETS = {
    "gate": ("gate_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "all": ("gate_proj", "up_proj", "down_proj"),
}
REGULARISERS = ("frobenius", "factors", "effect")
ALLOCATIONS = ("uniform", "sensitivity")
DEFAULT_RANKS: dict[str, int | str] = {
    "v1": 16,
    "v1_single": 16,
    "v2": 16,
    "outer": 64,
    "keyed": "auto",
    "keyed_pre": "auto",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NptConfig:
    """How attention rewrites the MLP of one layer, or of several alike.

    Build it with :meth:`preset`; ``docs/concepts/npt.md`` has the formula of each form.

    Attributes:
        form: One of ``v1 v1_single v2 outer keyed keyed_pre``.
        rank: Width of the bottleneck that the modulation is read from, 1..d_model. ``"auto"`` (``keyed``
            and ``keyed_pre`` only) takes, layer by layer, the smallest rank that keeps ``energy``.
        energy: Share of the attention output's second moment that ``rank="auto"`` keeps, in (0, 1].
        allocation: How ``keyed`` forms spread ``rank`` × layers over the layers. ``"uniform"``: each gets
            ``rank``. ``"sensitivity"``: each gets what its truncation costs in likelihood, the sum kept.
        tied: ``keyed`` only: store one factor, ``U = Dᵀ``, which halves the parameters of a given rank.
        modulation: ``v2`` only: ``additive``, ``multiplicative`` or ``both``.
        targets: ``outer`` only: the projections rewritten, ``gate``, ``gate_up`` or ``all``.
        num_updates: ``outer`` only: k, the number of rank-1 updates a projection gets, at least 1.
        key_bias: ``outer`` only: whether the keys v_a have a bias.
        regulariser: What the layer reports as its penalty: ``frobenius`` ‖ΔW_t‖²_F, ``factors``
            Σ‖v_a‖² + ‖v_b‖², ``effect`` ‖ΔW_t z_t‖².

    Raises:
        ConfigError: A field has a value outside its rule, or an option of another form is set.
    """

    form: str = "keyed"
    rank: int | str = "auto"
    energy: float = 0.99
    allocation: str = "uniform"
    tied: bool = False
    modulation: str = "both"
    targets: str = "gate"
    num_updates: int = 1
    key_bias: bool = True
    regulariser: str = "frobenius"

    def __post_init__(self) -> None:
        for name, known in (
            ("form", FORMS),
            ("allocation", ALLOCATIONS),
            ("modulation", GATE_MODULATIONS),
            ("targets", tuple(TARGETS)),
            ("regulariser", REGULARISERS),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ConfigError(
                    f"{name} must be one of {', '.join(known)}; got {value!r}.{nearest(str(value), known)}"
                )
        self._check_rank()
        if not isinstance(self.energy, int | float) or not 0.0 < self.energy <= 1.0:
            raise ConfigError(f"energy must be in (0, 1]; got {self.energy!r}. The default is 0.99.")
        if type(self.num_updates) is not int or self.num_updates < 1:
            raise ConfigError(f"num_updates must be an integer of at least 1; got {self.num_updates!r}.")
        for name in ("tied", "key_bias"):
            if type(getattr(self, name)) is not bool:
                raise ConfigError(f"{name} must be true or false; got {getattr(self, name)!r}.")
        self._check_options_belong_to_form()

    def _check_rank(self) -> None:
        if self.rank == "auto":
            if self.form not in CLOSED_FORMS:
                raise ConfigError(
                    f"rank='auto' needs a form with a closed form ({', '.join(CLOSED_FORMS)}); got form="
                    f"{self.form!r}. Give a rank, e.g. NptConfig.preset({self.form!r}, rank=16)."
                )
        elif type(self.rank) is not int or self.rank < 1:
            raise ConfigError(
                f"rank must be 'auto' or an integer in 1..d_model; got {self.rank!r}. "
                "Start with 16 (v1, v2), 64 (outer) or 'auto' (keyed)."
            )

    def _check_options_belong_to_form(self) -> None:
        owners = {
            "tied": ("keyed",),
            "modulation": ("v2",),
            "targets": ("outer",),
            "num_updates": ("outer",),
            "key_bias": ("outer",),
            "allocation": CLOSED_FORMS,
            "energy": CLOSED_FORMS,
        }
        defaults = {f.name: f.default for f in fields(self)}
        for name, forms in owners.items():
            if getattr(self, name) != defaults[name] and self.form not in forms:
                raise ConfigError(
                    f"{name}={getattr(self, name)!r} is an option of form {' and '.join(forms)}; got form="
                    f"{self.form!r}. Leave {name} out, or choose that form."
                )
        if self.rank == "auto" and self.allocation != "uniform":
            raise ConfigError(
                f"allocation={self.allocation!r} spreads a given rank over the layers; got rank='auto'. "
                "Give rank, the mean over the layers, e.g. rank=128."
            )

    @classmethod
    def preset(cls, name: str, **options: Any) -> "NptConfig":
        """Returns the form ``name`` with its usual rank, changed by ``options``.

        Raises:
            ConfigError: ``name`` is no preset, an option does not exist, or its value is out of range.
        """
        if name not in FORMS:
            raise ConfigError(f"preset must be one of {', '.join(FORMS)}; got {name!r}.{nearest(str(name), FORMS)}")
        return cls.from_dict({"form": name, "rank": DEFAULT_RANKS[name], **options})

    @classmethod
    def from_dict(cls, fields_: Mapping[str, Any]) -> "NptConfig":
        """Builds a configuration from field names and values; an unknown name is an error."""
        return from_fields(cls, fields_)

    def to_dict(self) -> dict[str, Any]:
        """Returns ``form``, ``rank`` and every other field that differs from its default."""
        defaults = {f.name: f.default for f in fields(self)}
        return {
            name: value for name, value in asdict(self).items() if name in ("form", "rank") or value != defaults[name]
        }

    def with_rank(self, rank: int) -> "NptConfig":
        """Returns this configuration for one layer whose rank is settled."""
        return replace(self, rank=rank, allocation="uniform", energy=0.99)

    @property
    def settled_rank(self) -> int:
        """``rank`` as a number, which calibration has settled before a layer is built."""
        assert isinstance(self.rank, int)
        return self.rank

    @property
    def has_closed_form(self) -> bool:
        """Whether calibration text gives this form its start."""
        return self.form in CLOSED_FORMS

    def starts_at_layerwise_optimum(self) -> bool:
        """Whether the closed form already matches the base layer by layer as well as any training can.

        The error of ``keyed`` is ``(U D − I) a`` exactly, which the leading eigenvectors of ``E[a aᵀ]`` minimise.
        """
        return self.form == "keyed"

    @property
    def needs_linear_projections(self) -> bool:
        """Whether ``W (x + y) = W x + W y`` must hold for the base's projections."""
        return self.form == "keyed_pre"

    @property
    def target_names(self) -> tuple[str, ...]:
        """Names of the projections that ``outer`` rewrites."""
        return TARGETS[self.targets]
