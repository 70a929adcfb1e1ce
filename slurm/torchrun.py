"""Run torchrun, and exit with the code of the first failed rank; torchrun itself always uses 1."""

import sys

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import main

try:
    main()
except ChildFailedError as error:
    print(error, file=sys.stderr, flush=True)
    _, failure = error.get_first_failure()
    sys.exit(failure.exitcode if failure.exitcode > 0 else 1)  # negative: ended by a signal
