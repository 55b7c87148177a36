"""Settings of all tests."""

from hypothesis import HealthCheck, settings

# a busy machine is no failure: how long an example takes is not what these tests are about
settings.register_profile("attnbench", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("attnbench")
