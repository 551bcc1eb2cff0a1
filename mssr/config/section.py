"""A section of the configuration: unknown keys are refused, a section without keys has its defaults."""

from pathlib import Path
from typing import Annotated, Any, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mssr.config.paths import expanded, without_variables

Place = Annotated[str, BeforeValidator(expanded)]  # a path, or a name on the Hugging Face hub
OptionalPlace = Annotated[str | None, BeforeValidator(expanded)]
NewFolder = Annotated[Path, AfterValidator(without_variables), BeforeValidator(expanded)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, values: Any) -> Any:
        """Complete sections by the defaults of their place, which differ from the section's own in sft.optimizer.

        A section without keys, which YAML reads as null, gets all of them.
        """
        if not isinstance(values, dict):
            return values
        complete = dict(values)
        for name, field in cls.model_fields.items():
            given = {} if values.get(name) is None else values[name]
            if name in values and is_section(field.annotation) and isinstance(given, dict):
                defaults = {} if field.is_required() else field.default.model_dump(exclude_unset=True)
                complete[name] = defaults | given
        return complete

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true, which pydantic would read as 1: one step, a learning rate of 1."""
        annotation = cls.model_fields[info.field_name].annotation
        kinds = {kind if isinstance(kind, type) else type(kind) for kind in get_args(annotation) or (annotation,)}
        if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"Input should be a number, got {value}")
        return value


def is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


def section_of(annotation: Any) -> type[Section] | None:
    """Return the section in the annotation of a key: `LoraConfig` of `LoraConfig | None`; None for a value."""
    return next(filter(is_section, (annotation, *get_args(annotation))), None)
