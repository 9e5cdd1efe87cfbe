"""What the fork server of `cli` loads besides modules. It is its last import."""

import gc

from fedbus.stores.s3.client import load_service_models

load_service_models()
gc.collect()
gc.freeze()  # so that a collection in a forked process copies no memory
