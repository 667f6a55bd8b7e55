"""The figures of a report, one file each: data in, a Vega-Lite specification out, made with Altair."""
