"""Install the package and the scripts: pip install . , then python -m split_model …"""

from pathlib import Path

from setuptools import setup

setup(
    name="llama",
    version="0.1.0",
    description="LLaMA split across several small accelerators: generation and prompt tuning",
    license="GPL-3.0-only",
    # named: find_packages() would take datasets/ for one
    packages=["llama", "llama.checkpoint", "llama.tuning"],
    package_data={"llama": ["example_prompts.jsonl", "example_questions.jsonl"]},
    py_modules=["convert_model", "example", "example_ft", "ft_main", "split_model"],
    extras_require={"fast": ["numba>=0.61"]},  # decoding on CPUs
    python_requires=">=3.10",
    install_requires=[
        line
        for line in Path(__file__).with_name("requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ],
)
