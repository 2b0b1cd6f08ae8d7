"""The template of the HTML report; styles and plots are inside it."""

PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>kronafuse bench</title>
<style>
body { font: 14px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; color: #222; }
table { border-collapse: collapse; margin: .5em 0 1.5em; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .text td, .text th { text-align: left; }
tr.ours { background: #eef6ee; }
.met { color: #176b2c; } .missed { color: #a3200d; }
img { max-width: 100%; }
summary { cursor: pointer; }
li { margin: .1em 0; }
</style>
</head>
<body>
<h1>kronafuse bench</h1>
<ul>
{% for line in machine %}
<li>{{ line }}</li>
{% endfor %}
</ul>
<p>{{ "Times are device time by CUDA-graph replay; host time is that of an eager forward."
if has_gpu else "Times are wall time; a CPU has no device time, and peak memory is not measured." }}
± is half the width between the 20th and 80th percentile. × frozen is the time over the frozen layer's.
× best is how many times faster than the fastest baseline that computes the case; = where the two cannot be
told apart. RMS is the error against float64, Δ of the delta alone.</p>
{% if targets %}
<h2>Targets</h2>
<table class="text">
<tr><th>target</th><th>limit</th><th>measured</th><th>cases</th><th>verdict</th></tr>
{% for each in targets %}
<tr><td>{{ each.name }}</td><td>{{ each.limit }}</td><td>{{ each.figure }}</td><td>{{ each.cases }}</td>
<td class="{{ each.verdict.split()[0] }}">{{ each.verdict }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% if images %}
<h2>Plots</h2>
{% for name, data in images.items() %}
<p><img alt="{{ name }}" src="data:image/png;base64,{{ data }}"></p>
{% endfor %}
{% endif %}
{% if steps %}
<h2>Training steps</h2>
<table>
<tr><th>model</th><th>batch</th><th>form</th><th>arm</th><th>ms</th><th>× frozen</th><th>peak GB</th>
<th>parameters</th><th>notes</th></tr>
{% for step in steps %}
<tr{% if step.arm.startswith("ours") %} class="ours"{% endif %}><td>{{ step.model }}</td><td>{{ step.batch }}</td>
<td>{{ step.form }}</td><td>{{ step.arm }}</td>
<td>{{ "%.1f" % step.step_ms.median if step.step_ms else "" }}</td>
<td>{{ "%.2f" % step.ratio_to_frozen if step.ratio_to_frozen is not none else "" }}</td>
<td>{{ "%.2f" % (step.peak_bytes / 1e9) if step.peak_bytes is not none else "" }}</td>
<td>{{ "{:,}".format(step.trained_parameters) if step.trained_parameters is not none else "" }}</td>
<td>{{ step.error or step.notes | join("; ") }}</td></tr>
{% endfor %}
</table>
{% endif %}
{% for problem in problems %}
<h2>{{ problem.title }}</h2>
{% if problem.rows %}
<table>
<tr>{% for name in columns %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in problem.rows %}
<tr{% if row[0].startswith("ours") %} class="ours"{% endif %}>
{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table>
{% endif %}
<details><summary>Not measured, notes, kernels</summary>
{% if problem.truth is not none %}
<p>Accuracy was taken on the first {{ problem.truth }} tokens.</p>
{% endif %}
<ul>
{% for text in problem.remarks %}
<li>{{ text }}</li>
{% endfor %}
{% for arm, text in problem.kernels %}
<li>{{ arm }} ran {{ text }}</li>
{% endfor %}
</ul>
</details>
{% endfor %}
</body>
</html>
"""
