"""GPTQModel with its kernels in plain torch, which take 16-bit floats alone."""

from fracbit.engines.engine import ServingEngine

GPTQMODEL = ServingEngine(
    title="GPTQModel 7.6",
    formats=("gptq", "awq"),
    installs=(
        ("torch==2.13.0", "numpy", "setuptools", "wheel"),
        ("torch==2.13.0", "gptqmodel==7.6.0", "--no-build-isolation"),  # 7.7.0 asks for torch 2.14.1
    ),
    runner="run_gptqmodel.py",
    dtype="float16",
    variables={
        "GPTQMODEL_CPU_WORKERS": "2",  # it plans for half of the cores and then asks for two workers
        "BUILD_CUDA_EXT": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    },
)
