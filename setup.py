"""Put the model's modules, which lie at the root for the Hub, into the package of a wheel."""

from glob import glob

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithModel(build_py):
    def find_package_modules(self, package, package_dir):
        modules = super().find_package_modules(package, package_dir)
        return modules + [(package, path[:-3], path) for path in glob("*_microvlm.py") if package == "microvlm"]


setup(cmdclass={"build_py": BuildWithModel})
