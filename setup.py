"""Maps the four top-level folders to the namespace `kvcal.*`; everything else is in pyproject.toml.

A static package list would silently drop new sub-packages, so they are found here.
`kernels` has no `__init__.py` of its own (see kernels/README.md).
"""

from setuptools import find_namespace_packages, setup

ROOMS = ("artifacts", "kernels", "runtime", "calibrate")


def is_package(name: str) -> bool:
    return not any(part in {"__pycache__", "demo_model"} for part in name.split("."))


packages = [f"kvcal.{room}" for room in ROOMS]
for room in ROOMS:
    packages += [f"kvcal.{room}.{found}" for found in find_namespace_packages(room) if is_package(found)]

setup(
    packages=packages,
    package_dir={f"kvcal.{room}": room for room in ROOMS},
    package_data={"kvcal.calibrate.builtin": ["demo_model/*"]},
)
