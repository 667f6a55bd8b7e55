"""What type checkers know of settings is what the methods have."""

import dataclasses
from typing import get_args

from kvcal.runtime.cla.method import Cla
from kvcal.runtime.methods import METHODS
from kvcal.runtime.typed import DecodeSettings, MethodName, Settings

TAKEN = {**METHODS, "cla": Cla}


def test_every_setting_of_every_method_is_typed():
    names = {field.name for method in TAKEN.values() for field in dataclasses.fields(method)}
    assert set(Settings.__annotations__) | set(DecodeSettings.__annotations__) == names | {"dense_layers"}


def test_a_setting_may_be_given_by_layer_wherever_a_method_takes_it():
    annotations = {**DecodeSettings.__annotations__, **Settings.__annotations__}
    for name, kind in TAKEN.items():
        for field in dataclasses.fields(kind):
            stated = annotations[field.name].__forward_arg__
            inside = stated.removeprefix("ByLayer[").removesuffix("]") if name != "cla" else stated
            own = {part.strip() for part in str(field.type).replace("Amount", "float | int").split("|")}
            assert own <= {part.strip() for part in inside.split("|")}, (name, field.name)


def test_every_method_has_its_name():
    assert set(get_args(MethodName)) == {*METHODS, "cla", "plan"}
