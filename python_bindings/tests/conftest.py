from hypothesis import settings

# The first example pays for imports: no example is judged by its time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
