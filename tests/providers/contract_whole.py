"""All that every provider does, in one class: a provider's test module makes a subclass, with a ``harness`` fixture.

What a provider declares that it cannot do is asked for all the same: the answer is a CapabilityError that names the
capability.
"""

from contract import ReceiveContract, SendContract
from contract_sessions import SessionKeyContract, SessionLockContract, SessionOrderContract
from contract_settlement import DeadLetterContract, LockContract, SettleContract


class WholeContract(
    SendContract,
    ReceiveContract,
    SettleContract,
    LockContract,
    DeadLetterContract,
    SessionOrderContract,
    SessionLockContract,
    SessionKeyContract,
):
    pass
