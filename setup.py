import setuptools; setuptools.setup()                      # what it says: pyproject.toml
