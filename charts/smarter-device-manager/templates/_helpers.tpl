{{/* The labels by which the DaemonSet selects its pods. */}}
{{- define "smarter-device-manager.selector" -}}
app.kubernetes.io/name: {{ .Values.application.appName }}
{{- end -}}

{{/* The labels of every object. */}}
{{- define "smarter-device-manager.labels" -}}
{{ include "smarter-device-manager.selector" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ .Chart.Name }}-{{ .Chart.Version }}
{{- end -}}

{{/* The labels of the nodes that run it. What the user gives replaces the default. */}}
{{- define "smarter-device-manager.nodeSelector" -}}
{{- .Values.nodeSelector | default (dict "smarter-device-manager" "enabled") | toYaml -}}
{{- end -}}
