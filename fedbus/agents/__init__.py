"""The agents of fedbus: each package is one independent asyncio component with an identity on the bus.

Server side: `server_manager` (opens runs and owns the task's state), `workflow_scheduler` (requests runs on
schedules and triggers), `flower_server` (runs the server session of a run), `training_monitor` (forwards metrics to
trackers) and `gateway` (serves the dashboard and its HTTP API).
Device side: `client_manager` (owns the client's state), `flower_client` (runs the client session of a run),
`inference` (serves predictions) and `device_monitor` (reports the device's health).

An agent imports `fedbus.agents.common` and no other agent.
"""
