"""The workflow scheduler: requests runs on schedules, on triggers and on demand."""
