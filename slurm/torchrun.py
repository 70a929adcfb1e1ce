"""torchrun, with the exit code of the first rank that failed: its own is 1 for all of them."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    print(error, file=sys.stderr, flush=True)
    _, failure = error.get_first_failure()
    sys.exit(failure.exitcode if failure.exitcode > 0 else 1)  # ended by a signal: negative
