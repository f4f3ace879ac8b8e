"""Put the model's modules and train_hf.py, which lie at the root, into the package of a wheel."""

from glob import glob

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithModel(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        at_root = [*glob("*_microvlm.py"), "train_hf.py"] if package == "microvlm" else []
        return modules + [(package, path[:-3], path) for path in at_root]


setup(cmdclass={"build_py": BuildWithModel})
