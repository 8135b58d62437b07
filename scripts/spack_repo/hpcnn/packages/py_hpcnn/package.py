"""Builds hpcnn from the checkout that this recipe lies in: `spack repo add scripts/spack_repo/hpcnn`."""

from pathlib import Path

from spack.package import *
from spack_repo.builtin.build_systems.cuda import CudaPackage
from spack_repo.builtin.build_systems.python import PythonPackage


class PyHpcnn(PythonPackage, CudaPackage):
    """Convolutional networks trained with MPI on CPU and GPU clusters."""

    git = f"file://{Path(__file__).resolve().parents[5]}"

    license("Apache-2.0 AND MIT")

    version("main", branch="main")

    variant("onednn", default=True, description="Compute by oneDNN on CPUs rather than by NumPy")
    variant("bf16", default=True, description="Train in bfloat16")
    variant("images", default=True, description="Import folders of pictures")
    variant("plots", default=False, description="Draw plots")
    variant("report", default=False, description="Make HTML reports of runs")
    variant("tensorboard", default=False, description="Write logs for TensorBoard")
    variant("onnx", default=False, description="Export ONNX files")

    # MPI is no variant: nothing trains without. Its library is chosen as usual, `py-hpcnn ^mpich`.
    with default_args(type=("build", "run")):
        depends_on("python@3.11:")
        depends_on("py-numpy@2.0:")
        depends_on("py-h5py@3.11:")
        depends_on("py-mpi4py@4.0:")
        depends_on("py-msgspec@0.19:")
        depends_on("py-tomli-w@1.0:")
        depends_on("py-tqdm@4.66:")
        depends_on("py-threadpoolctl@3.5:")
        depends_on("py-ml-dtypes@0.5:", when="+bf16")
        depends_on("py-pillow@10.3:", when="+images")
        depends_on("py-matplotlib@3.8:", when="+plots")
        depends_on("py-jinja2@3.1:", when="+report")
        depends_on("py-matplotlib@3.8:", when="+report")
        depends_on("py-tensorboardx@2.6:", when="+tensorboard")
        depends_on("py-onnx@1.16:", when="+onnx")
    depends_on("py-setuptools@77:", type="build")

    # Loaded by ctypes at run time; the numbers in hpcnn/ops/onednn are those of version 3.
    depends_on("onednn@3 cpu_runtime=omp", type="run", when="+onednn")

    # Kernels are compiled on the machine that runs them, by the toolkit that CuPy was built with.
    depends_on("py-ml-dtypes@0.5:", type=("build", "run"), when="+cuda")
    depends_on("cuda@12:", type="run", when="+cuda")
    depends_on("py-cupy@14.0:+cuda", type=("build", "run"), when="+cuda")
    for arch in CudaPackage.cuda_arch_values:
        depends_on(f"py-cupy cuda_arch={arch}", type=("build", "run"), when=f"+cuda cuda_arch={arch}")
    conflicts("+cuda cuda_arch=none", msg="CuPy is built for the GPU you have: add cuda_arch=90 for a Hopper.")

    def setup_run_environment(self, env: EnvironmentModifications) -> None:
        """Name the libraries that hpcnn loads while it runs."""
        if self.spec.satisfies("+onednn"):
            env.set("HPCNN_ONEDNN", find_libraries("libdnnl", self.spec["onednn"].prefix, recursive=True)[0])
        if self.spec.satisfies("+cuda"):
            env.set("CUDA_PATH", self.spec["cuda"].prefix)
