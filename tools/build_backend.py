"""The build backend: setuptools, built against the torch that is already there.

pip builds in an isolated environment that cannot see the torch of the environment it installs into, and would download
another. So this backend looks into that environment too (last on sys.path), asks for torch only when it has none, and
leaves everything else to setuptools. It imports no setuptools while loading: pip has not installed one yet.
"""

import sys
import sysconfig
from importlib.util import find_spec

for _folder in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
    if _folder not in sys.path:
        sys.path.append(_folder)


def get_requires_for_build_wheel(config_settings=None):
    """What pip must install before the build."""
    tools = ["setuptools>=77", "ninja", "pybind11>=2.13"]
    return tools if find_spec("torch") else [*tools, "torch>=2.11", "numpy"]


def get_requires_for_build_editable(config_settings=None):
    """The same for `pip install -e .`."""
    return get_requires_for_build_wheel(config_settings)


def get_requires_for_build_sdist(config_settings=None):
    """A source archive takes setup.py, and so torch."""
    return get_requires_for_build_wheel(config_settings)


def __getattr__(hook):
    import setuptools.build_meta

    return getattr(setuptools.build_meta, hook)
