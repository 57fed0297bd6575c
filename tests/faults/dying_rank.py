"""Run the training script's main() as one of several processes, of which the second is killed after its first step.

Started by a test:    accelerate launch ... --module tests.faults.dying_rank [FLAGS OF THE SCRIPT]
"""

import os
import signal

from dreambooth.errors import readable_errors
from tests.faults import child

if os.environ["RANK"] == "1":
    child.after_step(1, child.signal_oneself, signal.SIGKILL)
with readable_errors():
    child.script.main()
