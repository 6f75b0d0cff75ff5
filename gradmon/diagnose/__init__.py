"""From the alarm to the cause and the cure: incident bundles, replay, doctor, report."""
