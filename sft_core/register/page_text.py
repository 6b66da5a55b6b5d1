"""The page's Jinja2 source: HTML and style, nothing loaded from anywhere."""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #1a1a1a; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; width: 100%; table-layout: auto; }
th, td { text-align: left; vertical-align: top; padding: .25em .6em; border-bottom: 1px solid #ddd; }
th.number, td.number { text-align: right; font-variant-numeric: tabular-nums; }
.sample { margin-bottom: 1.2em; } .sample th { width: 10em; white-space: nowrap; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; font: 13px/1.4 ui-monospace, monospace; }
svg { width: 100%; max-width: 760px; font-size: 12px; }
.axis, .zero { fill: none; stroke: #999; } .zero { stroke-dasharray: 4 3; }
.curve { fill: none; stroke-width: 1.8; }
.c0 { stroke: #b9cfe6; } polyline.c0 { stroke-width: 1; } .c1 { stroke: #1f5fa8; } .c2 { stroke: #c4640a; }
path.good { stroke: #1b7f3b; stroke-width: 3; } circle.good { fill: #1b7f3b; }
path.bad { stroke: #b3261e; stroke-width: 3; } circle.bad { fill: #b3261e; }
.verdict { padding: .8em 1em; border-left: 5px solid #b3261e; background: #fbeeee; }
.verdict.promoted { border-color: #1b7f3b; background: #edf7ef; }
</style>
</head>
<body>
<h1>{{ title }}</h1>
<div class="verdict{{ ' promoted' if verdict.promote }}">
<strong>{{ passed if verdict.promote else 'Not promoted: the champion stays.' }}</strong>
<ul>
{% for comparison in verdict.comparisons %}
<li>The tuned model {{ comparison.words }}.</li>
{% endfor %}
{% for result in verdict.slices if result.blocks %}
<li>{{ result.words }}.</li>
{% endfor %}
{% for note in verdict.notes %}
<li>{{ note }}.</li>
{% endfor %}
</ul>
</div>

<h2>Figures</h2>
<table>
<tr><th>metric</th>{% for model in models %}<th class="number">{{ model }}</th>{% endfor %}</tr>
{% for name, values in metrics %}
<tr><td>{{ name }}</td>{% for value in values %}<td class="number">{{ value | figure }}</td>{% endfor %}</tr>
{% endfor %}
</table>

<h2>Differences on the same rows</h2>
{% for chart in differences %}
{{ chart }}
{% endfor %}

<h2>Slices</h2>
{% if verdict.slices %}
<p>Against the {{ models[-1] }}, on parts of the held-out rows.</p>
{{ slices }}
<ul>
{% for result in verdict.slices %}
<li>{{ result.words }}</li>
{% endfor %}
</ul>
{% else %}
<p>The held-out rows are all of one kind.</p>
{% endif %}

<h2>Training</h2>
{{ curve }}

<h2>Answers side by side</h2>
<p>Worst and best changes against the {{ models[-1] }}, by bits a byte.</p>
{% for sample in samples %}
<table class="sample">
<tr><th>prompt</th><td><pre>{{ sample.prompt | short }}</pre></td></tr>
<tr><th>reference</th><td><pre>{{ sample.reference | short }}</pre></td></tr>
{% for model, answer, match in sample.answers %}
<tr><th>{{ model }}{{ ' (match)' if match }}</th><td><pre>{{ (answer or '') | short }}</pre></td></tr>
{% endfor %}
</table>
{% else %}
<p>No answers were generated (evaluate.max_generated_rows).</p>
{% endfor %}

<h2>What became of the data</h2>
<table>
<tr><th>step</th><th>unit</th><th class="number">in</th><th class="number">out</th><th>set aside</th></tr>
{% for step, unit, came, went, reasons in ledgers %}
<tr><td>{{ step }}</td><td>{{ unit }}</td><td class="number">{{ came }}</td><td class="number">{{ went }}</td>
<td>{% for reason, count in reasons %}{{ reason }} {{ count }}{{ ', ' if not loop.last }}{% endfor %}</td></tr>
{% endfor %}
</table>
</body>
</html>
"""
