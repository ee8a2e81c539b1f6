"""The extension module, which is optional: where it cannot be compiled the package is pure Python (spillway.impl)."""

from Cython.Build import cythonize
from setuptools import Extension, setup

setup(
    ext_modules=cythonize(
        Extension(
            "spillway._native",
            ["src/native/_native.pyx"],
            extra_compile_args=["-O3"],
            optional=True,
        ),
        build_dir="build",
    )
)
