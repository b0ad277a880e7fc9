from pathlib import Path

from setuptools import find_packages, setup

extras = {
    "models": ["safetensors>=0.4", "tokenizers>=0.20", "huggingface_hub>=0.25", "gguf>=0.10", "jinja2>=3.1"],
    "cli": ["typer>=0.12", "rich>=13"],
    "bench": ["pytest>=8", "pytest-benchmark>=4", "matplotlib>=3.8", "rich>=13"],
    "hf": ["transformers>=5.0", "kernels>=0.10"],
    "test": ["pytest>=8", "pytest-benchmark>=4", "pytest-xdist>=3", "hypothesis>=6", "peft>=0.13"],
}
# the tests cover the command line, the checkpoint formats, equality with transformers, adapters of PEFT
extras["test"] += extras["models"] + extras["cli"] + extras["hf"]
extras["dev"] = [*extras["test"], *extras["bench"], "ruff", "mypy"]

setup(
    name="lmops",
    version="0.1.0",
    description="Triton kernels that make torch language models fast, as drop-in modules",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    # kernels/ is a plain folder, reached through the link lmops/kernels: a regular package named `kernels` would
    # shadow Hugging Face's package of that name (docs/design.md)
    packages=[*find_packages(include=["lmops", "lmops.*"]), "lmops.kernels"],
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy>=1.26"],
    extras_require=extras,
    entry_points={"console_scripts": ["lmops = lmops.cli:main"]},
)
