"""The extension module, which is optional: where it cannot be compiled the package is pure Python (spillway.impl)."""

from Cython.Build import cythonize
from setuptools import Extension, setup

modules = cythonize(
    Extension("spillway._native", ["src/native/_native.pyx"], extra_compile_args=["-O3"]), build_dir="build"
)
for module in modules:
    module.optional = True  # cythonize() does not pass it on

setup(ext_modules=modules)
