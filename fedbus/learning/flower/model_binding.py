"""How the arrays of an app and the stored model correspond.

An app may train the whole model, only a part of it, or arrays of its own:

    the app's arrays                                                 correspondence
    the names, shapes and dtypes of the stored model                 each is the tensor of its name
    numbered, as many as the stored model has, of the same shapes    each is the tensor of its position
    some names of the stored model                                   a part; the other tensors stay as they are
    the names of one submodule: ``weight`` for ``body.weight``       a part, if only one prefix fits
    anything else                                                    see `bind`

The result of a run is merged into the stored model, so that devices serve all of it. If its names or shapes differ
from those of the model, it replaces the model, and the next run begins with it as it is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedbus.learning.weights import ArchitectureMismatch, Arrays, cast, first_difference


@dataclass(frozen=True)
class ModelBinding:
    """The correspondence of an app's arrays to a stored model."""

    base: Arrays
    """The stored model, or the app's own arrays if nothing is stored or the app does not train the stored model."""
    names: Mapping[str, str] = field(default_factory=dict)
    """The stored name of each of the app's arrays that has another name there."""
    initial: Arrays = field(default_factory=dict)
    """The arrays that the app begins with, by its own names and in its order."""
    is_stored: bool = False
    """Whether *initial* is of the stored model, and not the app's own."""
    is_fixed: bool = False
    """Whether a result with other names, shapes or dtypes is an error."""

    def to_model(self, arrays: Arrays) -> Arrays:
        """Return the model that results from the app's *arrays*, in the dtypes of the base.

        Raises:
            ArchitectureMismatch: the architecture is fixed, and *arrays* have other names or shapes.

        """
        renamed = {self.names.get(name, name): array for name, array in arrays.items()}
        changed = first_difference({name: self.base[name] for name in renamed if name in self.base}, renamed)
        if changed and self.is_fixed and not _differ_in_dtype_only(self.base, renamed):
            raise ArchitectureMismatch(
                f"the app changed its arrays: {changed}. "
                'The task declares architecture = "fixed" in [tool.fedbus]; use "free" for arrays that may change'
            )
        cast_arrays = {name: _cast_like(array, self.base.get(name)) for name, array in renamed.items()}
        return {**self.base, **cast_arrays} if renamed.keys() <= self.base.keys() else cast_arrays


def bind(model: Arrays, app: Arrays, *, is_built: Callable[[], bool], is_fixed: bool = False) -> ModelBinding:
    """Bind the app's initial arrays *app* to the stored *model*.

    *is_built* returns whether the model has the architecture of the task's model builder. It is called only if *app*
    is no part of the model. If it has, the app's own arrays begin the run, unless they have names in common with the
    model: then the code has another architecture. If it has not, the model is the result of an earlier run of the
    app, and the run begins with it as it is.

    Raises:
        ArchitectureMismatch: the architecture of the app differs from the model's, and it is fixed or built.

    """
    if not model:
        return ModelBinding(app, initial=app, is_fixed=is_fixed)
    if not app:
        return ModelBinding(model, initial=model, is_stored=True, is_fixed=is_fixed)
    names = _find_names(model, app)
    if names is not None:
        initial = {name: model[stored] for name, stored in names.items()}
        renamed = {name: stored for name, stored in names.items() if name != stored}
        return ModelBinding(model, renamed, initial, is_stored=True, is_fixed=is_fixed)
    if not is_fixed and not is_built():
        return ModelBinding(model, initial=model, is_stored=True)
    if is_fixed or model.keys() & app.keys():
        raise ArchitectureMismatch(
            f"the stored model does not have the app's architecture: {first_difference(app, model)}. "
            "Start a new lineage for the new architecture, or return to the code that built the model"
        )
    return ModelBinding(app, initial=app)


def _find_names(model: Arrays, app: Arrays) -> dict[str, str] | None:
    """Return the stored name of each of the app's arrays, or None if *app* is not a part of *model*."""
    if all(name in model for name in app):
        return {name: name for name in app} if _fits(model, app, {name: name for name in app}) else None
    if list(app) == [str(number) for number in range(len(model))]:
        numbered = dict(zip(app, model, strict=True))
        if _fits(model, app, numbered):
            return numbered
    first = next(iter(app))
    prefixes = [stored.removesuffix(first) for stored in model if stored.endswith(f".{first}")]
    parts = [{name: prefix + name for name in app} for prefix in prefixes]
    fitting = [names for names in parts if _fits(model, app, names)]
    return fitting[0] if len(fitting) == 1 else None


def _fits(model: Arrays, app: Arrays, names: Mapping[str, str]) -> bool:
    return all(
        stored in model and _outline(model[stored]) == _outline(app[name]) for name, stored in names.items()
    )


def _outline(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return (*array.shape, str(array.dtype))


def _differ_in_dtype_only(base: Arrays, arrays: Arrays) -> bool:
    """Return whether names and shapes are equal: the mean of an integer tensor is a float, which is cast back."""
    return all(name in base and base[name].shape == array.shape for name, array in arrays.items())


def _cast_like(array: np.ndarray[Any, Any], like: np.ndarray[Any, Any] | None) -> np.ndarray[Any, Any]:
    return array if like is None or like.shape != array.shape else cast(array, like.dtype)
