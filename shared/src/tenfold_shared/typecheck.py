"""The run-time type checker of the tests: beartype, to which an int is a float, as it is to Python's type system.

Used as ``pytest --jaxtyping-packages=tenfold_x,tenfold_shared.typecheck.check``; beartype comes with the test requirements.
"""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
