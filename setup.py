"""The compiled modules and their flags; everything else is declared in pyproject.toml."""

import os
import sys

from Cython.Build import cythonize
from setuptools import Extension, setup

CORE = "queue_runtime/_core"
HEADERS = [f"{CORE}/{name}" for name in sorted(os.listdir(CORE)) if name.endswith((".h", ".pxd"))]

if sys.platform == "win32":
    FLAGS = ["/O2", "/std:c11", "/experimental:c11atomics"]
else:
    # GCC's own memset of a new object (rep stos) costs some 10 ns more than the C library's.
    FLAGS = ["-O3", "-std=c11", "-fvisibility=hidden", "-Wno-unused-function", "-fno-builtin-memset"]
    if "-g" not in os.environ.get("CFLAGS", "").split():
        FLAGS.append("-g0")  # debug symbols would make the wheel five times as large


def compiled(name: str) -> Extension:
    return Extension(
        f"queue_runtime._core.{name}",
        [f"{CORE}/{name}.pyx"],
        include_dirs=[CORE],
        depends=HEADERS,
        extra_compile_args=FLAGS,
    )


NAMES = sorted(name[:-4] for name in os.listdir(CORE) if name.endswith(".pyx"))

setup(
    options={"build_ext": {"parallel": os.cpu_count()}},
    ext_modules=cythonize(
        [compiled(name) for name in NAMES],
        language_level=3,
        compiler_directives={
            "binding": True,
            "boundscheck": False,
            "wraparound": False,
            "initializedcheck": False,
            "embedsignature": False,
        },
    ),
)
