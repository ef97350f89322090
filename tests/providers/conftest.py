"""The contract's modules hold assertions: have pytest explain them as it does a test's."""

import pytest

pytest.register_assert_rewrite("contract", "contract_sessions", "contract_settlement", "harness")
