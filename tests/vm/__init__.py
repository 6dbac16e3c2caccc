"""What only a real kernel shows: tests that boot the test VM (tools/vm) and the tests that run inside it.

``guest/`` is collected in the guest only. On the host ``test_boots.py`` boots one machine after the other and reports
every test of the guest as a subtest of its boot; ``test_vm.py`` tests what a boot promises (status, time limit, death
of the guest) and ``test_tools.py`` the builder, without a VM.
"""
